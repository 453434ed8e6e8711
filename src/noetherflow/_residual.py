"""How far from a symmetry: cosines of gradients, relative changes of losses, and symmetries that share entries."""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from noetherflow._types import Params
from noetherflow.symmetry import Symmetry


def cosine(gradients: Params, direction: Params, *, batched: bool = False) -> Tensor:
    r"""$|g \cdot v| / (|g|\,|v|)$ over the parameters that v moves.

    Vectors are divided by their largest entry first, so that squares neither vanish (below 1e-154) nor overflow, and
    16-bit types are converted to float32.

    Args:
        gradients: g, by name; with `batched`, every tensor has a leading axis of B examples.
        direction: v, by name.
        batched: Whether there is such an axis.

    Returns:
        Shape (), or (B,). 0 where g or v vanishes, infinity where g or v is not finite.
    """
    names = list(direction)
    stacks = [gradients[name] if batched else gradients[name].unsqueeze(0) for name in names]
    dtype = functools.reduce(
        torch.promote_types, [tensor.dtype for tensor in (*stacks, *direction.values())], torch.float32
    )
    g, g_size = _unit(stacks, dtype)
    v, v_size = _unit([direction[name].unsqueeze(0) for name in names], dtype)
    along = torch.stack([stack @ row[0] for stack, row in zip(g, v, strict=True)]).sum(0)
    norms = [torch.stack([stack.square().sum(1) for stack in side]).sum(0).sqrt() for side in (g, v)]
    result = (along.abs() / (norms[0] * norms[1])).nan_to_num(nan=torch.inf)
    result = torch.where((g_size == 0) | (v_size == 0), 0.0, result)
    return result if batched else result[0]


def _unit(tensors: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Stacks flattened to (B, n) over the largest entry of each example, and that entry, shape (B,)."""
    flat = [stack.flatten(1).to(dtype) for stack in tensors]
    largest = torch.stack([stack.abs().amax(1) for stack in flat if stack.numel()]).amax(0)
    return [stack / largest[:, None] for stack in flat], largest


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """How much each loss has changed, relative to that loss or to the mean of all, whichever is larger; shape (B,)."""
    scale = torch.maximum(before.abs(), before.abs().mean()).clamp_min(torch.finfo(before.dtype).tiny)
    return ((after - before).abs() / scale).nan_to_num(nan=torch.inf)


def entangled(symmetries: Mapping[str, Symmetry], params: Params) -> tuple[list[list[str]], set[str]]:
    """Group symmetries by the entries they share.

    Returns:
        The groups, and the names of the symmetries that act on some entry in two roles.
    """
    names = list(symmetries)
    parent = list(range(len(names)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

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
