"""Gradients of all replicas in one call, and functions that are recorded as a graph once and replayed afterwards."""

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
    r"""Gradients of $\sum_i c_i \ell_i(\theta_r)$ for all replicas r.

    The losses are vectorised over replicas, so that one backward pass gives all gradients. Where `torch.func` cannot
    vectorise a model, a loop runs one backward pass per replica.

    Args:
        model: The model; its parameters are not used.
        loss: `loss(model, batch)`, shape (n,).
        names: Parameters to differentiate by, in the order of the stacks of a call.
        fixed: All further parameters, equal for all replicas.
        rebuild: Makes a batch from a list of its tensors.
        dtype: Floating-point type of parameters and buffers.
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
        self._in_a_loop = False
        self._names, self._fixed, self._rebuild = list(names), dict(fixed), rebuild

    def __call__(
        self, stacks: Sequence[Tensor], weights: Tensor, leaves: Sequence[Tensor], *, shared: bool
    ) -> tuple[Sequence[Tensor], Tensor]:
        """Gradients, each of shape (R, *parameter), and mean losses, shape (R,).

        Args:
            stacks: Stacked parameters, each of shape (R, *parameter).
            weights: The coefficients c, shape (R, n).
            leaves: The tensors of the batch, shape (R, n, ...), or (n, ...) if `shared`.
            shared: Whether all replicas have the batch in common.

        Returns:
            Gradients in the order of `stacks`, and mean losses.
        """
        if not self._in_a_loop:
            try:
                return self._vectorised(stacks, weights, leaves, shared)
            except RuntimeError:
                # vmap refuses checkpoints, functions without setup_context and branches on values. A mistake in the
                # user's loss is raised again by the loop.
                self._in_a_loop = True
        gradients, means = [], []
        for replica, weight in enumerate(weights):
            moving = {name: stack[replica] for name, stack in zip(self._names, stacks, strict=True)}
            batch = self._rebuild([leaf if shared else leaf[replica] for leaf in leaves])
            losses, gradient = self._function.gradient({**self._fixed, **moving}, batch, self._names, weight)
            _require_shape(losses, weight)
            gradients.append(gradient)
            means.append(losses.mean())
        return [torch.stack([gradient[name] for gradient in gradients]) for name in self._names], torch.stack(means)

    def _vectorised(
        self, stacks: Sequence[Tensor], weights: Tensor, leaves: Sequence[Tensor], shared: bool
    ) -> tuple[Sequence[Tensor], Tensor]:
        """What a call returns, by `vmap` over replicas; raises RuntimeError if the model cannot be vectorised."""

        def of_replica(theta: Sequence[Tensor], weight: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            params = {**self._fixed, **dict(zip(self._names, theta, strict=True))}
            losses = self._function(params, self._rebuild(list(tensors)))
            _require_shape(losses, weight)
            return (weight * losses).sum(), losses.mean()

        def total(theta: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            dims = (0, 0, *(None if shared else 0 for _ in leaves))
            weighted, means = vmap(of_replica, in_dims=dims, randomness="different")(theta, weights, *leaves)
            return weighted.sum(), means

        gradients, means = grad(total, has_aux=True)(tuple(stacks))
        return gradients, means


def _require_shape(losses: Tensor, weight: Tensor) -> None:
    """Raise `LossError` unless losses have the shape (n,) of the coefficients."""
    if not isinstance(losses, Tensor) or losses.shape != weight.shape:
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise LossError(f"loss(model, batch) must return one loss per example, shape {tuple(weight.shape)}, got {got}")


@final
class Fused:
    """A function of tensors that is recorded as a graph of primitive operations in its first call, and replayed later.

    To vectorise and differentiate again in every step costs far more than the arithmetic of small models. A function
    that cannot be recorded, or whose graph returns different numbers, is called as it is.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self._function = function
        self._recorded: tuple[_Function, _Function] | None = None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The result of the function."""
        if self._recorded is None:
            result = self._function(*tensors)
            self._recorded = self._record(tensors, result)
            return result
        return self._recorded[0](*tensors)

    def rest(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The result of the function without its first entry; operations that only that entry needs are left out."""
        return self(*tensors)[1:] if self._recorded is None else self._recorded[1](*tensors)

    def _record(self, tensors: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> tuple[_Function, _Function]:
        """The fastest function that returns the expected tensors, and that function without its first entry."""
        functions = _with_rest(self._function)
        # The function works without a record, so no reason for a failure (a branch on a value, an operation that
        # make_fx does not know) concerns the caller.
        with contextlib.suppress(Exception):
            graph = make_fx(self._function)(*tensors)
            recording = Recording(graph, tensors)
            if _equal(recording.result, expected, slack=0):
                functions = _with_rest(graph.forward)
                full, rest = condense(recording)
                results = full(*tensors), rest(*tensors)
                # Products in a different order round differently.
                if _equal(results[0], expected, slack=1e3) and _equal(results[1], expected[1:], slack=1e3):
                    functions = full, rest
        return functions


def _with_rest(function: _Function) -> tuple[_Function, _Function]:
    """A function, and that function without the first entry of its result."""
    return function, lambda *tensors: function(*tensors)[1:]


def _equal(results: tuple[Tensor, ...], expected: tuple[Tensor, ...], *, slack: float) -> bool:
    """Whether tensors are equal up to a relative error of 1e-6, or up to slack * eps * largest expected entry."""

    def close(a: Tensor, b: Tensor) -> bool:
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        finite = b[b.isfinite()].abs()
        scale = finite.max().item() if slack and finite.numel() else 0.0
        return torch.allclose(a, b, rtol=1e-6, atol=slack * torch.finfo(b.dtype).eps * scale, equal_nan=True)

    return all(close(a, b) for a, b in zip(results, expected, strict=True))
