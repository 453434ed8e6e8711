"""The floating-point type in which a computation runs, and the differences that rounding in that type explains."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from noetherflow._errors import LossError


@final
@dataclass(frozen=True)
class Tolerance:
    """Relative differences that rounding explains, for a floating-point type.

    Args:
        rounding: Bound for two evaluations of a loss or a gradient: the square root of the machine epsilon.
        proof: Bound for the residual of an exact symmetry, the largest over examples and finite transformations. The
            residual of a wrong symmetry is 1e-3 to 1, so types of 16 bits tell only large errors from rounding.
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
    """The type with the largest machine epsilon, of the parts of complex types; float64 if none is in `TOLERANCES`."""
    parts = [dtype.to_real() if dtype.is_complex else dtype for dtype in dtypes]
    known = [dtype for dtype in parts if dtype in TOLERANCES]
    return max(known, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)


@final
class Watch(TorchFunctionMode):
    """A block that collects the dtypes of all calls in which a parameter, or a tensor that depends on one, takes part.

    A bfloat16 layer whose output is converted to float32, an autocast region, and a teacher under `no_grad` count. The
    dtype of the data does not count.

    Attributes:
        seen: The dtypes of the arguments and results of those calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, and collect the dtypes of its arguments and results."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = tensors_within((args, kwargs, result))
        if any(tensor.requires_grad or isinstance(tensor, nn.Parameter) for tensor in tensors):
            self.seen |= {tensor.dtype for tensor in tensors}
        return result


def tensors_within(value: Any) -> list[Tensor]:
    """The tensors in nested dictionaries, tuples and lists."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for entry in value for tensor in tensors_within(entry)]


@contextmanager
def explained(dtype: torch.dtype, converted: str) -> Iterator[None]:
    """A block that computes a loss in a type; errors say what to convert, and name the types before a conversion."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"dtype|scalar type|to be Float", str(error)):
            raise
        raise LossError(
            f"the loss cannot be computed in {dtype}: {error}. A tensor that is no part of "
            "the model, such as the data, class weights or a teacher, stays in its type. Make it part of the model "
            "or of a loss that is a module, or convert it in the loss to the type of the model's output"
            + (f", or compute in the model's type: dtype={converted}" if converted else "")
        ) from error
