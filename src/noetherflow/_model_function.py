"""A model as a function of its parameters: losses of examples and their gradients, backward pass included.

Layers under `torch.utils.checkpoint` repeat their forward pass during the backward pass, with the parameters that the
module has at that time. The backward pass therefore has to run while the given parameters are in place: forward and
backward pass share one `torch.func.functional_call`.
"""

import copy
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar, final

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from noetherflow._autograd import accumulate, is_reentrant, leaf, nodes_of
from noetherflow._batch import is_per_example, tensors_of, with_tensors
from noetherflow._errors import LossError
from noetherflow._holder import Holder, eager, places_of
from noetherflow._params import in_dtype, padding_rows, require_finite, require_names, snapshot
from noetherflow._per_example import in_a_loop, vectorised
from noetherflow._precision import TOLERANCES, Tolerance, Watch, coarsest, explained
from noetherflow._types import Batch, Loss, Params

_T = TypeVar("_T")


@final
class ModelFunction:
    r"""Losses $\ell(\theta, z)$ of the examples z of a batch, and their gradients, at any parameters $\theta$.

    The user's module is never changed. A call gets parameters as an argument, and copies of the buffers of the model
    and of a loss that is a module. Parameters that a call does not give have the values that the model had when this
    object was made. A tied parameter has one name. Compiled modules run uncompiled.

    Args:
        model: The model, in the mode (train or eval) in which it is evaluated.
        loss: `loss(model, batch)`, shape (B,).
        dtype: The floating-point type of parameters and buffers; None keeps the type of each tensor.

    Attributes:
        params: A copy of all parameters, by canonical name.
        trained: The entries of `params` that require gradients.
        padding: The padding rows of embeddings by canonical name of the weight.
        precision: The coarsest floating-point type in which the loss is computed, also if the losses are converted to a
            finer type. Before the first `observe`, the coarsest type of the parameters.
        reentrant: Whether the observed graph has a reentrant checkpoint, whose backward pass accepts no list of inputs.

    Raises:
        NonFiniteError: If a parameter is NaN or infinite.

    Examples:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> function = ModelFunction(net, lambda model, x: model(x).sum(1), torch.float64)
        >>> losses, gradient = function.gradient({"weight": torch.ones(1, 2).double()}, torch.eye(2).double())
        >>> losses, gradient["weight"]
        (tensor([1., 1.], dtype=torch.float64), tensor([[1., 1.]], dtype=torch.float64))
    """

    def __init__(self, model: nn.Module, loss: Loss, dtype: torch.dtype | None = None) -> None:
        self.params = snapshot(model, dtype)
        require_finite(self.params, "parameter")
        named = dict(model.named_parameters())
        self.trained = {name: self.params[name] for name, parameter in named.items() if parameter.requires_grad}
        self.precision = coarsest(tensor.dtype for tensor in self.params.values())
        self.reentrant = False
        self.padding = padding_rows(model)
        self._holder = Holder(model, loss)
        self._places, others = places_of(self._holder, model)
        # A module may write into its buffers, so every call gets copies. The parameters of a loss are constants.
        self._buffers = {id(tensor): in_dtype(tensor.detach().clone(), dtype) for tensor in self._holder.buffers()}
        self._others = {place: id(tensor) for place, tensor in others.items()}
        self._constants = {id(tensor): in_dtype(tensor.detach(), dtype) for tensor in others.values()}
        floats = {parameter.dtype for parameter in named.values() if parameter.is_floating_point()}
        self._converted = ", ".join(sorted(str(before) for before in floats if dtype not in (None, before)))
        self._dtype = dtype
        self._in_a_loop = False
        saved = {id(tensor) for tensor in self._holder.state_dict(keep_vars=True).values()}
        self._state = {key for key, buffer in self._buffers.items() if key in saved and buffer.is_floating_point()}

    def __call__(self, params: Params, batch: Batch) -> Tensor:
        """The losses, shape (B,), as a function that `torch.func` can transform."""
        return self.at(params, lambda: self._holder.losses(batch))

    def at(self, params: Params, action: Callable[[], _T]) -> _T:
        """Run an action while the module has the given parameters, and return its result."""
        require_names(self.params, params, "the parameters of a call")
        buffers = {key: buffer.clone() for key, buffer in self._buffers.items()}
        further = self._constants | buffers
        values = self.params | dict(params)
        state = {place: values[name] for place, name in self._places.items()}
        state |= {place: further[key] for place, key in self._others.items()}
        with eager():
            result: _T = functional_call(self._holder, state, (action,), tie_weights=False)
        return result

    def with_values(self, params: Params) -> "ModelFunction":
        """This function with other values of the parameters that a call does not give."""
        other = copy.copy(self)
        other.params = self.params | dict(params)
        other.trained = {name: other.params[name] for name in self.trained}
        return other

    def moved(self, change: Callable[[Tensor], Tensor], change_buffer: Callable[[Tensor], Tensor]) -> "ModelFunction":
        """This function with changed parameters, of the loss too, and changed buffers. Tied tensors remain tied."""
        other = self.with_values({name: change(tensor) for name, tensor in self.params.items()})
        other._constants = {key: change(tensor) for key, tensor in self._constants.items() if key not in self._buffers}
        other._buffers = {key: change_buffer(tensor) for key, tensor in self._buffers.items()}
        return other

    def with_state(self, change: Callable[[Tensor], Tensor]) -> "ModelFunction":
        """A function of this model with changed floating-point buffers, except those that a state dict leaves out."""
        result = copy.copy(self)
        result._buffers = {key: change(old) if key in self._state else old for key, old in self._buffers.items()}
        return result

    def then(self, params: Params, batch: Batch, action: Callable[[Tensor], None]) -> Tensor:
        """The losses, shape (B,), and an action on them, such as a backward pass, while the parameters are in place."""

        def run() -> Tensor:
            losses = self._holder.losses(batch)
            action(losses)
            return losses

        return self.at(params, run)

    def losses(self, params: Params, batch: Batch) -> Tensor:
        """The losses, shape (B,), without an autograd graph."""
        try:
            with torch.no_grad(), self._explained(), warnings.catch_warnings():
                # A reentrant checkpoint warns of every forward pass without gradients.
                warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
                return self(params, batch)
        except RuntimeError as error:
            if "not require grad" not in str(error):
                raise
            return self._with_graph(params, batch).detach()  # a loss with derivatives, as of physics-informed networks

    def _with_graph(self, params: Params, batch: Batch) -> Tensor:
        """The losses, shape (B,), in an autograd graph whose leaves are the parameters."""
        with torch.enable_grad(), self._explained():
            return self({name: leaf(tensor) for name, tensor in params.items()}, batch)

    def gradient(
        self, params: Params, batch: Batch, names: Collection[str] | None = None, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        r"""The losses of a batch and the gradient of $\sum_i c_i\ell_i$, by a backward pass.

        Args:
            params: The parameters; for parameters that are not given, the model's values.
            batch: The examples.
            names: The parameters to differentiate by; by default all of `params`.
            weights: The coefficients c, shape (B,); by default 1.

        Returns:
            Losses, shape (B,), and the gradient by name; zeros for parameters that no gradient reaches.
        """
        losses, gradient = self._differentiate(params, batch, names, weights)
        return losses, {name: torch.zeros_like(params[name]) if g is None else g for name, g in gradient.items()}

    def unreached(self, params: Params, batch: Batch) -> list[str]:
        """The names of the parameters that no gradient of the losses reaches."""
        return [name for name, g in self._differentiate(params, batch, None, None)[1].items() if g is None]

    def example_gradients(
        self, params: Params, batch: Batch, size: int, examples: slice, where: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of examples of a batch and their gradients.

        Every example is evaluated as a batch of size 1. Tensors of the batch whose leading dimension is not the batch
        size are shared by all examples. The evaluation is vectorised, or a loop where `vmap` refuses the model.

        Args:
            params: The parameters to differentiate by; for parameters that are not given, the model's values.
            batch: The batch.
            size: The batch size B.
            examples: The range of examples that are evaluated, b of them.
            where: Name of the batch in error messages.

        Returns:
            Losses, shape (b,), and gradients by name, shape (b, *parameter).

        Raises:
            LossError: If no tensor of the batch has an entry per example.
        """
        leaves = tensors_of(batch)
        stacked = [is_per_example(leaf, size) for leaf in leaves]
        if not any(stacked):
            raise LossError(
                f"{where}: the loss has {size} examples, but no tensor of the batch has that leading dimension: "
                f"{[tuple(leaf.shape) for leaf in leaves]}"
            )
        singles = [x[examples].unsqueeze(1) if is_own else x for x, is_own in zip(leaves, stacked, strict=True)]
        return self._each(params, singles, lambda tensors: with_tensors(batch, tensors), [False, *stacked], "different")

    def at_points(
        self, params: Params, tensors: Sequence[Tensor], rebuild: Callable[[list[Tensor]], Batch]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sums of losses of b batches at stacked parameters, shape (b,), and their gradients; arguments as `_each`."""
        return self._each(params, tensors, rebuild, [True] * (1 + len(tensors)), "same")

    def observe(self, batch: Batch) -> "ModelFunction":
        """Set `precision` and `reentrant` from an evaluation of a batch; returns this object."""
        with Watch() as watch:
            losses = self._with_graph(self.params, batch)
        self.precision = coarsest({*watch.seen, losses.dtype})
        self.reentrant = losses.grad_fn is not None and is_reentrant(nodes_of(losses.grad_fn))
        return self

    @property
    def tolerance(self) -> Tolerance:
        """The differences that rounding explains in the type in which the loss is computed."""
        return TOLERANCES[self.precision]

    def _each(
        self,
        params: Params,
        tensors: Sequence[Tensor],
        rebuild: Callable[[list[Tensor]], Batch],
        stacked: Sequence[bool],
        randomness: str,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Evaluate b batches, at stacked parameters or at parameters in common.

        Args:
            params: Parameters by name.
            tensors: The tensors of the batches.
            rebuild: Makes a batch from a list of its tensors.
            stacked: Whether the parameters, and then each of `tensors`, have a leading axis of length b.
            randomness: `same` or `different` random numbers, as `vmap` has it.

        Returns:
            Sums of losses, shape (b,), and their gradients by name, shape (b, *parameter).
        """

        def loss_sum(params: Params, *leaves: Tensor) -> Tensor:
            return self(params, rebuild(list(leaves))).sum()

        def alone(params: Params, *leaves: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            losses, gradient = self.gradient(params, rebuild(list(leaves)))
            return gradient, losses.sum()

        inputs = (dict(params), *tensors)
        shared = tuple(not is_stacked for is_stacked in stacked)

        def together() -> tuple[dict[str, Tensor], Tensor]:
            result: tuple[dict[str, Tensor], Tensor] = vectorised(grad_and_value(loss_sum), inputs, shared, randomness)
            return result

        if not self._in_a_loop:
            try:
                # torch.func differentiates after `loss_sum` has returned, so the parameters have to be in place around
                # the complete call.
                gradients, values = together() if stacked[0] else self.at(params, together)
                return values, gradients
            except Exception:
                # torch.func refuses checkpoints, branches, sparse gradients and old-style autograd functions; a model
                # may refuse the tensors of torch.func by any error. The loop raises a mistake of the user again.
                self._in_a_loop = True
        gradients, values = in_a_loop(alone, inputs, shared)
        return values, gradients

    def _differentiate(
        self, params: Params, batch: Batch, names: Collection[str] | None, weights: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """As `gradient`, with None for parameters that no gradient reaches."""
        names = list(params) if names is None else list(names)
        leaves = {name: leaf(params[name]) for name in names}
        gradient: dict[str, Tensor | None] = dict.fromkeys(names)

        def backward(losses: Tensor) -> None:
            total = losses.sum() if weights is None else (weights * losses).sum()
            if total.grad_fn is None:
                return
            nodes = nodes_of(total.grad_fn)
            if is_reentrant(nodes):
                accumulate(total, nodes, leaves.values())
                gradient.update({name: leaf.grad for name, leaf in leaves.items()})
            else:
                parts = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
                gradient.update(zip(names, parts, strict=True))

        with torch.enable_grad(), self._explained():
            # A reentrant checkpoint gives no gradients unless one of its inputs requires gradients.
            inputs = {name: leaf(params.get(name, tensor)) for name, tensor in self.trained.items() if self.reentrant}
            losses = self.then({**params, **inputs, **leaves}, batch, backward)
        # An embedding with sparse=True has a sparse gradient.
        return losses.detach(), {name: None if g is None else g.to_dense() for name, g in gradient.items()}

    def _explained(self) -> AbstractContextManager[None]:
        """A block whose errors about floating-point types say how to convert tensors outside the model."""
        return explained(self._dtype or self.precision, self._converted)
