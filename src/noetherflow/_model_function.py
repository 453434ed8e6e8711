"""A model as a function of its parameters: the losses of examples and their gradients, backward pass included.

Layers under `torch.utils.checkpoint` compute their forward pass again in the backward pass, and look their parameters
up once more. The backward pass therefore has to run while the given parameters are in place: forward and backward pass
share one `torch.func.functional_call`.
"""

import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from noetherflow._autograd import accumulate, is_reentrant, nodes_of
from noetherflow._batch import is_per_example, tensors_of, with_tensors
from noetherflow._errors import LossError
from noetherflow._holder import Holder, places_of
from noetherflow._params import in_dtype, require_finite, require_names, snapshot
from noetherflow._precision import TOLERANCES, Tolerance, Watch, coarsest
from noetherflow._types import Batch, Loss, Params

_T = TypeVar("_T")


@final
class ModelFunction:
    r"""Losses $\ell(\theta, z)$ of the examples z of a batch, and their gradients, at any parameters $\theta$.

    The user's module is never touched. Parameters are passed in; the module's buffers, and those of a loss that is a
    module, are copied for every call. A tied parameter has one name. Parameters that a call does not give have the
    values that the model had when this object was made. Compiled modules run uncompiled.

    Args:
        model: The model, in the mode (train or eval) in which it is evaluated.
        loss: `loss(model, batch)`, shape (B,).
        dtype: The floating-point type of parameters and buffers; None keeps each tensor's.

    Attributes:
        params: A copy of all parameters, by canonical name.
        trained: The entries of `params` that require gradients.
        precision: The coarsest floating-point type in which the loss is computed, whatever type the losses have; until
            `observe` was called, that of the parameters.
        reentrant: Whether a graph held a layer under a reentrant checkpoint, whose backward pass accepts no list of
            inputs.

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
        self.trained = {
            name: self.params[name] for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        self.precision = coarsest(tensor.dtype for tensor in self.params.values())
        self.reentrant = False
        self._holder = Holder(model, loss)
        self._places, others = places_of(self._holder, model)
        # Of buffers, every call gets a copy: a module may write into them. Parameters of a loss are constants.
        self._buffers = {id(buffer): in_dtype(buffer.detach().clone(), dtype) for buffer in self._holder.buffers()}
        self._others = {place: id(tensor) for place, tensor in others.items()}
        self._constants = {id(tensor): in_dtype(tensor.detach(), dtype) for tensor in others.values()}
        floats = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        self._changed = sorted(str(kind) for kind in floats if dtype not in (None, kind))
        self._dtype = dtype
        self._one_by_one = False

    def __call__(self, params: Params, batch: Batch) -> Tensor:
        """The losses, shape (B,), as a function that `torch.func` can transform."""
        return self.at(params, lambda: self._holder.losses(batch))

    def at(self, params: Params, action: Callable[[], _T]) -> _T:
        """Do something while the module has the given parameters, and return its result."""
        require_names(self.params, params, "the parameters of a call")
        buffers = {key: buffer.clone() for key, buffer in self._buffers.items()}
        kept = self._constants | buffers
        values = self.params | dict(params)
        state = {place: values[name] for place, name in self._places.items()}
        state |= {place: kept[key] for place, key in self._others.items()}
        with eager():
            result: _T = functional_call(self._holder, state, (action,), tie_weights=False)
        return result

    def then(self, params: Params, batch: Batch, action: Callable[[Tensor], None]) -> Tensor:
        """The losses, shape (B,), after an action on them (a backward pass) while the parameters are in place."""

        def run() -> Tensor:
            losses = self._holder.losses(batch)
            action(losses)
            return losses

        return self.at(params, run)

    def losses(self, params: Params, batch: Batch) -> Tensor:
        """The losses, shape (B,), without a graph."""
        with torch.no_grad(), self._explained(), warnings.catch_warnings():
            # Reentrant checkpoints say so of every forward pass that is not meant to be differentiated.
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
            return self(params, batch)

    def gradient(
        self, params: Params, batch: Batch, names: Collection[str] | None = None, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        r"""The losses of a batch and the gradient of their sum, by a plain backward pass.

        Args:
            params: Where; parameters that are missing are the model's.
            batch: The examples.
            names: The parameters to differentiate by; by default all of `params`.
            weights: Coefficients c of $\sum_i c_i\ell_i$, shape (B,); ones by default.

        Returns:
            Losses, shape (B,), and the gradient by name; zeros for parameters that no gradient reaches.
        """
        losses, gradients = self._differentiate(params, batch, names, weights)
        return losses, {
            name: torch.zeros_like(params[name]) if gradient is None else gradient
            for name, gradient in gradients.items()
        }

    def unreached(self, params: Params, batch: Batch) -> list[str]:
        """The parameters on which the losses do not depend differentiably."""
        return [
            name for name, gradient in self._differentiate(params, batch, None, None)[1].items() if gradient is None
        ]

    def example_gradients(
        self, params: Params, batch: Batch, size: int, examples: slice, where: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of examples of a batch, shape (b,), and their gradients by `params`, shape (b, *parameter).

        Every example is evaluated as a batch of one. Tensors of the batch whose leading dimension is not the batch size
        are shared by all examples. The evaluation is vectorised if `torch.func` can, and a loop if not.

        Args:
            params: Where, and by which parameters to differentiate.
            batch: The batch.
            size: Its number of examples.
            examples: Which of them.
            where: What to call the batch.

        Returns:
            Both.

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
        chosen = [leaf[examples].unsqueeze(1) if mine else leaf for leaf, mine in zip(leaves, stacked, strict=True)]
        return self._each(params, chosen, lambda leaves: with_tensors(batch, leaves), [False, *stacked], "different")

    def gradients_at(
        self, params: Params, tensors: Sequence[Tensor], rebuild: Callable[[list[Tensor]], Batch]
    ) -> dict[str, Tensor]:
        """Gradients of batches that each have their own parameters: all tensors have a leading axis of batches.

        Returns:
            By name, shape (b, *parameter).
        """
        return self._each(params, tensors, rebuild, [True] * (1 + len(tensors)), "same")[1]

    def observe(self, batch: Batch) -> "ModelFunction":
        """Evaluate the losses of a batch once, and note how they are computed: `precision` and `reentrant`."""
        leaves = {name: _leaf(tensor) for name, tensor in self.params.items()}
        with torch.enable_grad(), self._explained(), Watch() as watch:
            losses = self(leaves, batch)
        self.precision = coarsest({*watch.seen, losses.dtype})
        self.reentrant = losses.grad_fn is not None and is_reentrant(nodes_of(losses.grad_fn))
        return self

    @property
    def tolerance(self) -> Tolerance:
        """What rounding leaves in the type in which the loss is computed."""
        return TOLERANCES[self.precision]

    def _each(
        self,
        params: Params,
        tensors: Sequence[Tensor],
        rebuild: Callable[[list[Tensor]], Batch],
        stacked: Sequence[bool],
        randomness: str,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Values and gradients along the leading axis of those inputs (parameters first) that are stacked."""

        def total(params: Params, *leaves: Tensor) -> Tensor:
            return self(params, rebuild(list(leaves))).sum()

        def vectorised() -> tuple[dict[str, Tensor], Tensor]:
            dims = tuple(0 if mine else None for mine in stacked)
            with warnings.catch_warnings():
                # A single operation that cannot be vectorised is done one by one, with a warning.
                warnings.filterwarnings("ignore", message="There is a performance drop")
                result: tuple[dict[str, Tensor], Tensor] = vmap(
                    grad_and_value(total), in_dims=dims, randomness=randomness
                )(dict(params), *tensors)
                return result

        if not self._one_by_one:
            try:
                # In place also while torch.func differentiates, which it does after `total` has returned.
                gradients, values = vectorised() if stacked[0] else self.at(params, vectorised)
                return values, gradients
            except RuntimeError:
                # Checkpoints, functions without setup_context, recurrent layers, branches on values. What is a mistake
                # of the loss is raised again by the loop.
                self._one_by_one = True
        inputs = zip((next(iter(params.values())), *tensors), stacked, strict=True)
        leading = next(tensor for tensor, mine in inputs if mine)
        results = []
        for index in range(len(leading)):
            here = {name: tensor[index] for name, tensor in params.items()} if stacked[0] else params
            single = [tensor[index] if mine else tensor for tensor, mine in zip(tensors, stacked[1:], strict=True)]
            losses, gradient = self.gradient(here, rebuild(single))
            results.append((losses.sum(), gradient))
        return (
            torch.stack([value for value, _ in results]),
            {name: torch.stack([gradient[name] for _, gradient in results]) for name in params},
        )

    def _differentiate(
        self, params: Params, batch: Batch, names: Collection[str] | None, weights: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        names = list(params) if names is None else list(names)
        leaves = {name: params[name].detach().requires_grad_() for name in names}
        gradients: dict[str, Tensor | None] = dict.fromkeys(names)

        def backward(losses: Tensor) -> None:
            total = losses.sum() if weights is None else (weights * losses).sum()
            if total.grad_fn is None:
                return
            nodes = nodes_of(total.grad_fn)
            if is_reentrant(nodes):
                accumulate(total, nodes, leaves.values())
                gradients.update({name: leaf.grad for name, leaf in leaves.items()})
            else:
                reached = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
                gradients.update(zip(names, reached, strict=True))

        with torch.enable_grad(), self._explained():
            losses = self.then({**params, **leaves}, batch, backward)
        return losses.detach(), gradients

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say what to do about tensors outside the model that stay in another floating-point type."""
        try:
            yield
        except RuntimeError as error:
            if not self._changed or not re.search(r"dtype|scalar type", str(error)):
                raise
            raise LossError(
                f"the loss cannot be computed in {self._dtype}, to which the parameters were converted: {error}. A "
                "tensor that is not part of the model, such as class weights or a teacher, stays in its type. Make it "
                "part of the model or of a loss that is a module, or convert it in the loss to the type of the model's "
                f"output, or compute in the model's type: dtype={', '.join(self._changed)}"
            ) from error


def eager() -> AbstractContextManager[Any, Any]:
    """A block in which compiled modules run as they were written, so that modes and `torch.func` see into them."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()  # nothing is compiled; loading the compiler takes a second and much memory
    return torch.compiler.set_stance("force_eager")


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())
