"""One function for one step of all replicas, recorded once and replayed without the overhead of its making."""

import contextlib
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from noetherflow._errors import LossError
from noetherflow._model_function import ModelFunction
from noetherflow._types import Batch, Loss, Params
from noetherflow.simulation.graph import Recording, condense

_Function = Callable[..., tuple[Tensor, ...]]


@final
class ReplicaGradients:
    r"""Gradients of $\sum_i c_i \ell_i$ for all replicas together.

    The loss is vectorised over replicas, and one backward pass serves all. Where `torch.func` cannot vectorise a model,
    each replica has a backward pass of its own.

    Args:
        model: The model, of which only the structure is used.
        loss: One loss per example.
        names: The parameters that move, in the order of the stacks below.
        fixed: Those that do not.
        rebuild: Puts the tensors of a batch back into its containers.
        dtype: Floating-point type of everything.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        names: Sequence[str],
        fixed: Params,
        rebuild: Callable[[list[Tensor]], Batch],
        dtype: torch.dtype,
    ) -> None:
        self._function = ModelFunction(model, loss, dtype)
        self._one_by_one = False
        self._names, self._fixed, self._rebuild = list(names), dict(fixed), rebuild

    def __call__(
        self, stacks: Sequence[Tensor], weights: Tensor, leaves: Sequence[Tensor], *, shared: bool
    ) -> tuple[Sequence[Tensor], Tensor]:
        """Gradients, each of shape (R, *parameter), and mean losses, shape (R,).

        Args:
            stacks: Stacked parameters, each of shape (R, *parameter).
            weights: The coefficients c, shape (R, n).
            leaves: The tensors of the batch, shape (R, n, ...), or (n, ...) if all replicas share them.
            shared: Whether they do.

        Returns:
            Both.
        """
        if not self._one_by_one:
            try:
                return self._together(stacks, weights, leaves, shared)
            except RuntimeError:
                # Checkpoints, functions without setup_context, branches on values. What is a mistake of the loss is
                # raised again by the loop.
                self._one_by_one = True
        results = []
        for replica, weight in enumerate(weights):
            params = {**self._fixed, **{name: stack[replica] for name, stack in zip(self._names, stacks, strict=True)}}
            batch = self._rebuild([leaf if shared else leaf[replica] for leaf in leaves])
            losses, gradient = self._function.gradient(params, batch, self._names, weight)
            _require_shape(losses, weight)
            results.append((gradient, losses.mean()))
        gradients = [torch.stack([gradient[name] for gradient, _ in results]) for name in self._names]
        return gradients, torch.stack([mean for _, mean in results])

    def _together(
        self, stacks: Sequence[Tensor], weights: Tensor, leaves: Sequence[Tensor], shared: bool
    ) -> tuple[Sequence[Tensor], Tensor]:
        """All replicas vectorised."""

        def weighted_loss(moving: Sequence[Tensor], weight: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            params = {**self._fixed, **dict(zip(self._names, moving, strict=True))}
            values = self._function(params, self._rebuild(list(tensors)))
            _require_shape(values, weight)
            return (weight * values).sum(), values.mean()

        def total(moving: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            dims = (0, 0, *(None if shared else 0 for _ in leaves))
            weighted, means = vmap(weighted_loss, in_dims=dims, randomness="different")(moving, weights, *leaves)
            return weighted.sum(), means

        gradients, means = grad(total, has_aux=True)(tuple(stacks))
        return gradients, means


def _require_shape(values: Tensor, weight: Tensor) -> None:
    if not isinstance(values, Tensor) or values.shape != weight.shape:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise LossError(f"loss(model, batch) must return one loss per example, shape {tuple(weight.shape)}, got {got}")


@final
class Fused:
    """A function of tensors, recorded as a graph of primitive operations at its first call and replayed from then on.

    Vectorising and differentiating anew at every step costs far more than the arithmetic of small models. A function
    that cannot be recorded, or whose record gives other numbers, is simply called.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self._function = function
        self._recorded: tuple[_Function, _Function] | None = None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The function's value."""
        if self._recorded is None:
            result = self._function(*tensors)
            self._recorded = self._record(tensors, result)
            return result
        return self._recorded[0](*tensors)

    def rest(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """All but the first entry of the function's value, which costs less where nothing else needs that entry."""
        return self(*tensors)[1:] if self._recorded is None else self._recorded[1](*tensors)

    def _record(self, tensors: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> tuple[_Function, _Function]:
        functions = _with_rest(self._function)
        # Whatever keeps a model from being recorded (a branch on a value, an exotic operation) is no concern of the
        # caller.
        with contextlib.suppress(Exception):
            graph = make_fx(self._function)(*tensors)
            recording = Recording(graph, tensors)
            if _equal(recording.result, expected, slack=0):
                functions = _with_rest(graph.forward)
                whole, rest = condense(recording)
                found = whole(*tensors), rest(*tensors)
                # Products that are taken in another order round differently.
                if _equal(found[0], expected, slack=1e3) and _equal(found[1], expected[1:], slack=1e3):
                    functions = whole, rest
        return functions


def _with_rest(function: _Function) -> tuple[_Function, _Function]:
    return function, lambda *tensors: function(*tensors)[1:]


def _equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], *, slack: float) -> bool:
    """Whether tensors are equal, up to so many units of rounding of the largest entry."""

    def close(a: Tensor, b: Tensor) -> bool:
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        finite = b[b.isfinite()].abs()
        scale = finite.max().item() if slack and finite.numel() else 0.0
        return torch.allclose(a, b, rtol=1e-6, atol=slack * torch.finfo(b.dtype).eps * scale, equal_nan=True)

    return all(close(a, b) for a, b in zip(found, expected, strict=True))
