"""Finite transformations and other points, written out by hand, without the code that finds symmetries."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

import noetherflow as nf

# Largest change of a loss that rounding explains, and the size of the coordinates of a transformation.
ROUNDING = 1e-9
SIZE = 0.3


def elsewhere(model: nn.Module, seed: int) -> nn.Module:
    """A copy at other parameters and buffers: each number is scaled and shifted, also zeros and frozen numbers."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for name, tensor in (*other.named_parameters(), *other.named_buffers()):
            if tensor.is_complex():
                tensor.mul_(torch.exp(0.3 * noise(tensor))).add_(
                    torch.complex(0.1 * noise(tensor), 0.1 * noise(tensor))
                )
            elif tensor.is_floating_point():
                tensor.mul_(torch.exp(0.3 * noise(tensor)))
                if "var" not in name:  # a variance stays positive
                    tensor.add_(0.1 * noise(tensor))
    return other


def moved(params: dict[str, Tensor], symmetry: Any, seed: int) -> dict[str, Tensor]:
    """Parameters under a random element of a symmetry, row by row."""
    generator = torch.Generator().manual_seed(seed)
    result = {name: tensor.clone() for name, tensor in params.items()}
    count = len(_rows(result, (*symmetry.plus, *symmetry.minus)[0])[1])
    x = SIZE * torch.randn(count, count, generator=generator, dtype=torch.float64)
    if isinstance(symmetry, nf.MatrixSymmetry):
        x = (x + x.T) / 2 / count**0.5
    elif isinstance(symmetry, nf.DiagonalSymmetry):
        x = x[0].diag()
    else:
        assert isinstance(symmetry, nf.ScalarSymmetry)
    # Each axis is acted on in turn; an axis that is listed twice is acted on twice.
    for sign, side in ((1, symmetry.plus), (-1, symmetry.minus)):
        for axis in side:
            part, rows = _rows(result, axis)
            if isinstance(symmetry, nf.ScalarSymmetry):
                new = rows * torch.exp(sign * x[0, 0])
            else:
                new = torch.linalg.matrix_exp(sign * x).to(rows.dtype) @ rows
            along = part.movedim(axis.dim, 0)
            along.copy_(new.reshape(along.shape))
    return result


def _rows(params: dict[str, Tensor], axis: nf.Axis) -> tuple[Tensor, Tensor]:
    """The part of a tensor on which an axis acts, and this part as a matrix with a row per coordinate."""
    part = params[axis.name]
    if axis.within is not None:
        dim, start, stop = axis.within
        part = part.narrow(dim, start, stop - start)
    start, stop = axis.start or 0, part.shape[axis.dim] if axis.stop is None else axis.stop
    part = part.narrow(axis.dim, start, stop - start)
    return part, part.movedim(axis.dim, 0).reshape((stop - start) // axis.repeat, -1)


def change(model: nn.Module, loss: nf.Loss, batch: Any, symmetry: nf.Symmetry, seed: int) -> float | None:
    """The largest change of an example's loss, relative to the mean loss; None where losses are not finite."""
    there = elsewhere(model, seed)
    losses = []
    with torch.no_grad():
        for transformed in (False, True):
            if transformed:
                params = dict(there.named_parameters())
                for name, tensor in moved({name: p.detach() for name, p in params.items()}, symmetry, seed).items():
                    params[name].copy_(tensor)
            torch.manual_seed(seed)  # dropout
            losses.append(loss(there, batch))
    before, after = losses
    if not bool(before.isfinite().all()) or not 1e-100 < float(before.abs().mean()) < 1e100:
        return None
    return float(((after - before).abs() / before.abs().mean()).max())
