"""Operations without a second derivative, computed by operations that have one; and what to do about the others."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_NAMES = ("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse",
          "per_sample_weights", "include_last_offset", "padding_idx")  # fmt: skip
# A part of the message of an error, and what to do about it.
_REMEDIES = (
    ("embedding_bag", 'nn.Embedding and a maximum, in place of nn.EmbeddingBag(mode="max")'),
    ("attention", "matrix products and a softmax, in place of the fused kernel of attention"),
    ("rnn", "nn.LSTMCell or nn.GRUCell in a loop, in place of the fused layer; or forecast on the CPU"),
    ("once_differentiable", "a backward pass that can be differentiated, without @once_differentiable"),
)
_USUAL = "operations of torch that have one, such as matrix products and sums, at least in the copy that is forecast"


@final
class Differentiable(TorchFunctionMode):
    """Within the block, sums and means of the rows of a table have second derivatives; their values stay."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Call an operation, or the operations that compute the result and have second derivatives."""
        kwargs = kwargs or {}
        if func is functional.embedding_bag and (rows := embedding_bag(args, kwargs)) is not None:
            return rows
        return func(*args, **kwargs)


def embedding_bag(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The sum or the mean of the rows of every bag.

    Args:
        args: The positional arguments of `torch.nn.functional.embedding_bag`.
        kwargs: Its keyword arguments.

    Returns:
        The result, shape (bags, columns); None where it is not a sum or a mean, or changes the table or its gradient.
    """
    given = dict(zip(_NAMES, args, strict=False)) | dict(kwargs)
    ids, weight, offsets = given["input"], given["weight"], given.get("offsets")
    mode, weights, padding = given.get("mode") or "mean", given.get("per_sample_weights"), given.get("padding_idx")
    if mode not in ("sum", "mean") or given.get("max_norm") is not None or given.get("scale_grad_by_freq"):
        return None
    if ids.ndim == 2:
        count = len(ids)
        bags = torch.arange(count, device=ids.device).repeat_interleave(ids.shape[1])
    elif offsets is None:
        return None  # torch says what is wrong
    else:
        count = len(offsets) - bool(given.get("include_last_offset"))
        bags = torch.bucketize(torch.arange(len(ids), device=ids.device), offsets[:count], right=True) - 1
    ids = ids.flatten()
    factors = torch.ones_like(ids) if padding is None else (ids != padding % len(weight)).long()
    scales = factors.to(weight.dtype) if weights is None else factors * weights.flatten()
    sums = weight.new_zeros(count, weight.shape[1]).index_add(0, bags, weight[ids.long()] * scales[:, None])
    if mode == "sum":
        return sums
    sizes = torch.zeros(count, dtype=torch.long, device=ids.device).index_add(0, bags, factors.long())
    return sums / sizes.clamp(min=1)[:, None]


def reason_of(message: str) -> str:
    """Why the Hessian cannot be told, and what to do, from the first line of an error of a backward pass."""
    remedy = next((text for part, text in _REMEDIES if part in message.lower()), _USUAL)
    return f"an operation has no second derivative ({message.rstrip('. ')}): write it by {remedy}"
