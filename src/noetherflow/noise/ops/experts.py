"""Products of sorted rows with the matrix of their expert: a linear map for every expert."""

from itertools import pairwise
from typing import Any

import torch

from noetherflow.noise.capture.calls import named
from noetherflow.noise.capture.mode import Capture
from noetherflow.noise.ops.registry import gradient_rule


@gradient_rule("_grouped_mm", "grouped_mm")
def grouped_mm(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows (N, m), matrices (E, m, n), and where the rows of each expert end."""
    x, weights, ends, bias, _ = named(("self", "mat2", "offs", "bias", "out_dtype"), args, kwargs)
    if ends is None or bias is not None or x.ndim != 2 or weights.ndim != 3:
        return NotImplemented
    with capture:
        starts = [0, *ends.tolist()]
        parts = [x[start:end] @ weights[e] for e, (start, end) in enumerate(pairwise(starts))]
        if starts[-1] < len(x):
            parts.append(x.new_zeros(len(x) - starts[-1], weights.shape[2]))
        return torch.cat(parts)
