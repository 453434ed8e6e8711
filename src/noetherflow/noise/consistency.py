"""Checks that the parts of moments from a file belong together."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from noetherflow._errors import ParameterShapeError

if TYPE_CHECKING:
    from noetherflow.noise.moments import NoiseMoments


def require_consistent(moments: "NoiseMoments") -> None:
    """Raise unless names, shapes and dtypes of all statistics fit the mean gradient and the symmetries.

    Args:
        moments: The moments.

    Raises:
        ParameterShapeError: If a statistic is missing, is not expected, or is not float64 of the expected shape.
        ParameterNameError: If a symmetry names parameters without a mean gradient.
    """
    if moments.count < 0:
        raise ParameterShapeError(f"the number of examples is {moments.count}, expected 0 or more")
    for what in ("scatter", "spreads"):
        if getattr(moments, what).keys() != moments.symmetries.keys():
            given, expected = sorted(getattr(moments, what)), sorted(moments.symmetries)
            raise ParameterShapeError(f"{what} belongs to the symmetries {given}, expected {expected}")
    for symmetry in moments.symmetries.values():
        symmetry.check(moments.mean)
    for what, tensor, shape in _statistics(moments):
        if tensor.dtype != torch.float64 or tuple(tensor.shape) != shape:
            raise ParameterShapeError(
                f"{what} has dtype {tensor.dtype}, shape {tuple(tensor.shape)}, expected float64, {shape}"
            )


def _statistics(moments: "NoiseMoments") -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    """Every tensor, with its place in the moments and the expected shape."""
    yield "total_scatter", moments.total_scatter, ()
    for name, tensor in moments.mean.items():
        yield f"mean[{name!r}]", tensor, tuple(tensor.shape)
    for name, tensor in moments.square_scatter.items():
        # No tensor has a negative size, so a parameter without a mean is refused.
        expected = tuple(moments.mean[name].shape) if name in moments.mean else (-1,)
        yield f"square_scatter[{name!r}]", tensor, expected
    stack = {name: tensor[None] for name, tensor in moments.mean.items()}
    for name, symmetry in moments.symmetries.items():
        sides = zip(("plus", "minus"), moments.scatter[name], symmetry.grams(moments.mean), strict=True)
        for side, tensor, like in sides:
            yield f"scatter[{name!r}].{side}", tensor, tuple(like.shape)
        expected = (3, *symmetry.example_charges(stack).plus.shape[1:])
        for field, tensor in moments.spreads[name]._asdict().items():
            yield f"spreads[{name!r}].{field}", tensor, expected
