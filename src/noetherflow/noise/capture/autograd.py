"""Operations whose backward pass records the gradients of parameters."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from noetherflow._errors import SettingsError
from noetherflow.noise.capture.calls import unseen
from noetherflow.noise.kernels import group_norm_back

# From what an operation was given and the gradient of what came out to what autograd hands on to its parameters.
Note = Callable[[Tensor, Tensor], Iterable[Tensor | None]]


class DerivativeError(SettingsError):
    """A loss takes derivatives of the model: the gradients of its gradients would need what is not computed."""


def tap(output: Tensor, source: Tensor, note: Note, roots: Iterable[Tensor]) -> Tensor:
    """A tensor as it is, written in place; its gradient is noted in the backward pass.

    Args:
        output: What an operation returned: no view, and not saved for its own backward pass.
        source: A tensor that the note will need again.
        note: What to make of it and the gradient of the output.
        roots: The tensors to which gradients go on.

    Returns:
        The output, which now requires gradients.
    """
    return _Tap.apply(output, source, note, *roots)  # type: ignore[no-untyped-call]


def spread(
    tensor: Tensor,
    shape: tuple[int, ...],
    note: Callable[[Tensor], Tensor | list[Tensor | None] | None],
    roots: Iterable[Tensor],
) -> Tensor:
    """A tensor expanded; the gradient of every copy is noted."""
    return _Spread.apply(tensor, shape, note, *roots)  # type: ignore[no-untyped-call]


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, note: Note, roots: Iterable[Tensor], *, keeps_inputs: bool
) -> Tensor:
    """A linear map whose parameters' gradients are noted instead of computed; the note may not need the inputs."""
    return _Linear.apply(x, weight, bias, note, keeps_inputs, *roots)  # type: ignore[no-untyped-call]


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, note: Note, roots: Iterable[Tensor]
) -> Tensor:
    """A normalisation over groups of channels; the note is of what weight and bias get from every example."""
    return _GroupNorm.apply(x, weight, bias, groups, eps, note, *roots)  # type: ignore[no-untyped-call]


def _recording() -> AbstractContextManager[Any, Any]:
    """The block in which a backward pass records; gradients of gradients would need what is not computed.

    Returns:
        The block.

    Raises:
        DerivativeError: If the backward pass is itself to be differentiated.
    """
    if torch.is_grad_enabled():
        raise DerivativeError(
            "a backward pass with create_graph=True runs through a block in which noise is measured: its gradients "
            "cannot be differentiated. Use estimate_noise(exact=True), or MicrobatchMeter"
        )
    return unseen()


class _Tap(Function):
    """What `tap` does."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, source: Tensor, note: Note, *roots: Tensor) -> Tensor:
        ctx.note, ctx.count = note, len(roots)
        ctx.save_for_backward(source)
        ctx.mark_dirty(output)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        (gradient,) = gradients
        if gradient is None:
            return None, None, None, *(None,) * ctx.count
        with _recording():
            return gradient, None, None, *ctx.note(ctx.saved_tensors[0], gradient)


class _Spread(Function):
    """What `spread` does."""

    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, shape: tuple[int, ...], note: Callable[[Tensor], Any], *roots: Tensor
    ) -> Tensor:
        ctx.note, ctx.count = note, len(roots)
        ctx.set_materialize_grads(False)
        return tensor.expand(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        (gradient,) = gradients
        if gradient is None:
            return None, None, None, *(None,) * ctx.count
        with _recording():
            handed = ctx.note(gradient)
            return None, None, None, *(handed if isinstance(handed, list) else [handed])


class _Linear(Function):
    """What `linear` does."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, note: Note, keeps_inputs: bool, *roots: Tensor
    ) -> Tensor:
        ctx.note, ctx.shape = note, x.shape
        # Inputs that nobody needs may be written over. Detached: under a checkpoint, PyTorch 2.6 loses the hooks of a
        # parameter that is saved as it is.
        ctx.save_for_backward(x if keeps_inputs else x.new_empty(0), weight.detach())
        output = functional.linear(x, weight, bias)
        # No view, so that what follows may work in place.
        return output if output._base is None else torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        with _recording():
            flat = gradient.reshape(-1, weight.shape[0])  # a copy, if it has to be one, serves both
            back = (flat @ weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
            return back, None, None, None, None, *ctx.note(x, flat.view(gradient.shape))


class _GroupNorm(Function):
    """What `group_norm` does: its own backward pass would go over memory once for this one's sums and once more."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int,
        eps: float,
        note: Note,
        *roots: Tensor,
    ) -> Tensor:
        sizes = (*x.shape[:2], x[0, 0].numel(), groups, eps)
        output, mean, scale = torch.native_group_norm(x, weight, bias, *sizes)
        ctx.note = note
        ctx.save_for_backward(x, None if weight is None else weight.detach(), mean, scale)  # as above
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, mean, scale = ctx.saved_tensors
        with _recording():
            back, *sums = group_norm_back(x, gradients[0], weight, mean, scale)
            return back, None, None, None, None, None, *ctx.note(*sums)
