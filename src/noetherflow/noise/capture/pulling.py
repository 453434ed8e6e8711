"""Gradients of every example through a function: vectorised, or by a plain backward pass for each."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import vjp

from noetherflow._per_example import vectorised


def pulled(
    function: Callable[..., Tensor], examples: Sequence[Tensor], params: Sequence[Tensor], gradients: Tensor
) -> list[Tensor]:
    """The gradients by parameters of a function of the tensors of an example and of parameters.

    Args:
        function: A function of tensors of an example, followed by parameters.
        examples: The tensors of every example, each of shape (B, ...).
        params: The parameters.
        gradients: Gradients of the results, shape (B, ...).

    Returns:
        The gradients of every example by each parameter, shape (B, *parameter).
    """

    def of_example(*parts: Tensor) -> tuple[Tensor, ...]:
        *inputs, gradient = parts
        result: tuple[Tensor, ...] = vjp(lambda *params: function(*inputs, *params), *params)[1](gradient)
        return result

    try:
        return list(vectorised(of_example, (*examples, gradients), (False,) * (len(examples) + 1), "error"))
    except Exception:  # torch.func raises whatever it likes about what it cannot do
        rows = []
        for *inputs, gradient in zip(*examples, gradients, strict=True):
            leaves = [tensor.detach().requires_grad_() for tensor in params]
            with torch.enable_grad():
                result = function(*inputs, *leaves)
            rows.append(torch.autograd.grad(result, leaves, gradient, allow_unused=True, materialize_grads=True))
        return [torch.stack(stack) for stack in zip(*rows, strict=True)]
