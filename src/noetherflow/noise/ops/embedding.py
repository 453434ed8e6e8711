"""Tables of which rows are read."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from noetherflow.noise.capture.calls import named
from noetherflow.noise.capture.mode import Capture
from noetherflow.noise.capture.owned import table
from noetherflow.noise.ops.registry import gradient_rule

_INTEGERS = (torch.int64, torch.int32)


@gradient_rule(functional.embedding)
def embedding(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows of a table."""
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    ids, weight, padding, most, _, by_frequency, sparse = named(names, args, kwargs)
    if most is not None or by_frequency or sparse:
        return NotImplemented
    return _read(capture, weight, ids, padding)


@gradient_rule(Tensor.__getitem__)
def index(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A parameter indexed with numbers of rows."""
    weight, ids = args
    ids = ids[0] if isinstance(ids, tuple) and len(ids) == 1 else ids
    if not isinstance(ids, Tensor) or ids.dtype not in _INTEGERS:
        return NotImplemented
    if weight.ndim != 2:
        with capture:
            rows = (weight.flatten(1) if weight.ndim > 2 else weight[:, None])[ids]
            return rows.unflatten(-1, weight.shape[1:]) if weight.ndim > 2 else rows[..., 0]
    return _read(capture, weight, torch.where(ids < 0, ids + len(weight), ids), None, of=ids)


def _read(capture: Capture, weight: Tensor, ids: Tensor, padding: int | None, of: Tensor | None = None) -> Any:
    matrix = capture.tracked(weight)
    layout = capture.apart(ids if of is None else of, 0)
    if matrix is None or layout is None:
        return NotImplemented
    padding = None if padding is None else padding % len(weight)
    ids = ids.long()

    def note(tokens: Tensor, outputs: Tensor) -> list[Tensor | None]:
        if padding is not None:
            outputs = outputs.masked_fill((tokens == padding)[..., None], 0.0)
        read, gradients = layout.rows(tokens, 0, capture.size), layout.rows(outputs, 1, capture.size)
        return [matrix.note(table(matrix.views, read, gradients))]

    # A tensor of its own, which functional.embedding does not make, and no row that counts from the end.
    rows = weight.detach().index_select(0, ids.reshape(-1))
    return capture.tap(torch.ops.aten._unsafe_view(rows, (*ids.shape, weight.shape[1])), ids, note, matrix)


@gradient_rule(functional.embedding_bag)
def embedding_bag(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Sums and means of rows, as many for every bag."""
    names = ("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse",
             "per_sample_weights", "include_last_offset", "padding_idx")  # fmt: skip
    ids, weight, _, most, _, by_frequency, mode, sparse, weights, _, padding = named(names, args, kwargs)
    mode = "mean" if mode is None else mode
    if ids.ndim != 2 or most is not None or by_frequency or sparse or mode == "max":
        return NotImplemented
    with capture:
        rows = functional.embedding(ids, weight, padding)
        counted = torch.ones_like(ids) if padding is None else (ids != padding % len(weight))
        factors = counted.to(rows.dtype) if weights is None else counted.to(rows.dtype) * weights
        sums = (rows * factors[..., None]).sum(1)
        return sums if mode == "sum" else sums / counted.sum(1, keepdim=True).clamp(min=1)
