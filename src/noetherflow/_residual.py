"""Deviations from a symmetry: cosines of gradients and relative changes of losses. Symmetries that share entries."""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from noetherflow._device import CPU, joined
from noetherflow._types import Params
from noetherflow.symmetry import AxisSymmetry, Symmetry


def cosine(gradients: Params, direction: Params, *, batched: bool = False) -> Tensor:
    r"""The cosine $|g \cdot v| / (|g|\,|v|)$ over the parameters of v.

    A complex entry counts as two real entries, $g \cdot v = \mathrm{Re}\,\bar g v$: PyTorch's gradient of a real loss
    is $\partial\ell/\partial\mathrm{Re} + i\,\partial\ell/\partial\mathrm{Im}$. Vectors are divided by their largest
    entry first, because squares of entries below 1e-154 underflow and squares of entries above 1e154 overflow. Types of
    16 bits are converted to float32.

    Args:
        gradients: g by name, shape (*parameter), or (B, *parameter) with `batched`.
        direction: v by name, shape (*parameter).
        batched: Whether the gradients are those of B examples.

    Returns:
        Shape (), or (B,) with `batched`. 0 where g or v vanishes, infinity where g or v is not finite.
    """
    names = list(direction)
    stacks = [_real(gradients[name] if batched else gradients[name].unsqueeze(0)) for name in names]
    along = [_real(direction[name].unsqueeze(0)) for name in names]
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in (*stacks, *along)], torch.float32)
    g, g_size = _unit(stacks, dtype)
    v, v_size = _unit(along, dtype)
    products = torch.stack(joined(rows @ vector[0] for rows, vector in zip(g, v, strict=True))).sum(0)
    norms = [torch.stack(joined(part.square().sum(1) for part in parts)).sum(0).sqrt() for parts in (g, v)]
    result = (products.abs() / (norms[0] * norms[1])).nan_to_num(nan=torch.inf)
    result = torch.where((g_size == 0) | (v_size == 0), 0.0, result)
    return result if batched else result[0]


def _real(tensor: Tensor) -> Tensor:
    """A complex tensor as a real tensor with a last axis for both parts; a real tensor as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _unit(stacks: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Stacks flattened to (B, n) and divided by the largest entry of each example, and that entry, shape (B,)."""
    flat = [stack.reshape(len(stack), -1).to(dtype) for stack in stacks]
    largest = torch.stack(joined(rows.abs().amax(1) for rows in flat if rows.numel())).amax(0)
    return [rows / largest[:, None].to(rows.device) for rows in flat], largest


def active_rows(symmetry: Symmetry, gradients: Params, params: Params) -> Tensor:
    r"""The rows of a symmetry in which an entry of the parameters and of the gradient is not zero.

    Elsewhere both sides of $g \cdot Q\theta = 0$ vanish entry by entry, for example at dead units or at factors that
    are zero, and the equation tests nothing.

    Args:
        symmetry: The symmetry.
        gradients: The gradient of an example by name.
        params: The parameters by name.

    Returns:
        Booleans, shape (n,) for a symmetry with n rows, and (1,) for a symmetry whose rows have a coordinate in common.
    """
    axes = symmetry.regions(params)
    rows = [(axis.rows(gradients[axis.name]) != 0) & (axis.rows(params[axis.name]) != 0) for axis in axes]
    if isinstance(symmetry, AxisSymmetry) and symmetry.per_row:
        return torch.stack(joined(entries.any(1) for entries in rows)).any(0)
    return torch.stack(joined(entries.any() for entries in rows)).any().reshape(1)


def is_rounding(losses: Tensor, gradients: Params, direction: Params, precision: torch.dtype) -> bool:
    r"""Whether rounding explains the slope of a loss along a direction: $|g|\,|v| < 64\,\epsilon\,|\ell|$.

    The gradient of a unit vector that has only one entry vanishes. What is computed is 1e-17, in any direction.

    Args:
        losses: The losses whose sum has the gradient g, shape (B,).
        gradients: g by name.
        direction: v by name.
        precision: The coarsest type in which the losses were computed.

    Returns:
        Whether the cosine of g and v says nothing.
    """
    size = losses.abs().sum().double().to(CPU)
    g, v = (_length([_real(tensors[n]) for n in direction]).to(CPU) for tensors in (gradients, direction))
    # A loss that vanishes, or a length that is not finite, is never rounding.
    return bool(g / size * v < min(64 * torch.finfo(precision).eps, 1e-3))


def _length(tensors: list[Tensor]) -> Tensor:
    """The norm of several tensors, of which the squares may underflow."""
    largest = torch.stack(joined(tensor.abs().max() for tensor in tensors if tensor.numel())).max().double()
    if not largest > 0:
        return largest
    lengths = joined((tensor / largest.to(tensor.device)).norm().double() for tensor in tensors)
    return largest * torch.stack(lengths).norm().to(largest.device)


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """|after - before| / max(|before|, mean |before|) of every loss, shape (B,); infinity for NaN."""
    scale = torch.maximum(before.abs(), before.abs().mean()).clamp_min(torch.finfo(before.dtype).tiny)
    return ((after - before).abs() / scale).nan_to_num(nan=torch.inf)


def entangled(symmetries: Mapping[str, Symmetry], params: Params) -> tuple[list[list[str]], set[str]]:
    """Group symmetries by the entries of parameters that they share.

    Args:
        symmetries: Symmetries by name.
        params: Parameters by canonical name.

    Returns:
        The groups, as lists of names, and the names of the symmetries that act on an entry through two axes.
    """
    names = list(symmetries)
    # Disjoint sets: every symmetry points to a symmetry of its group, and the root of the group to itself.
    parent = list(range(len(names)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    # For every entry, the index of the last symmetry that acts on the entry; -1 for none.
    owner: dict[str, Tensor] = {}
    doubled = set()
    for index, symmetry in enumerate(symmetries.values()):
        for axis in symmetry.regions(params):
            tensor = params[axis.name]
            if axis.name not in owner:
                owner[axis.name] = torch.full(tensor.shape, -1, dtype=torch.int32, device=tensor.device)
            rows = axis.rows(owner[axis.name])
            for other in rows.unique().tolist():
                if other == index:
                    doubled.add(names[index])
                elif other >= 0:
                    parent[root(other)] = root(index)
            owner[axis.name] = axis.replace(owner[axis.name], torch.full_like(rows, index))
    groups: dict[int, list[str]] = {}
    for index, name in enumerate(names):
        groups.setdefault(root(index), []).append(name)
    return list(groups.values()), doubled
