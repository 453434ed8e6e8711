"""The floating-point type in which a computation runs, and what rounding in that type leaves."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@final
@dataclass(frozen=True)
class Tolerance:
    """Relative differences that rounding explains, for one floating-point type.

    Args:
        rounding: Of two evaluations of one loss or one gradient: the square root of the machine epsilon.
        proof: Residual of an exact symmetry, the largest over examples and finite transformations. A mistake leaves
            1e-3 to 1; types of 16 bits tell only large mistakes from rounding.
    """

    rounding: float
    proof: float


TOLERANCES = {
    torch.float64: Tolerance(rounding=2.0**-26, proof=1e-10),
    torch.float32: Tolerance(rounding=2.0**-11.5, proof=2e-5),
    torch.float16: Tolerance(rounding=2.0**-5, proof=5e-3),
    torch.bfloat16: Tolerance(rounding=2.0**-3.5, proof=4e-2),
}


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The floating-point type with the largest machine epsilon; float64 if there is none."""
    known = [dtype for dtype in dtypes if dtype in TOLERANCES]
    return max(known, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)


@final
class Watch(TorchFunctionMode):
    """A block in which the floating-point types of all calls are noted that have to do with parameters.

    A bfloat16 layer whose output is converted to float32, an autocast region and a teacher under `no_grad` all count;
    the type of the data does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function; note the types of its arguments and results."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = _tensors((args, kwargs))
        returned = _tensors(result)
        if any(tensor.requires_grad or isinstance(tensor, nn.Parameter) for tensor in (*given, *returned)):
            self.seen |= {tensor.dtype for tensor in (*given, *returned)}
        return result


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in nested containers."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for part in value for tensor in _tensors(part)]
