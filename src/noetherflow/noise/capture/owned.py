"""Gradients of single vectors, each of which belongs to some example, put together as uses of a parameter."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from noetherflow.noise.capture.layouts import Rows
from noetherflow.noise.uses import Outer, PerExample, Use, View
from noetherflow.noise.uses import Rows as TableRows


@final
@dataclass(eq=False)
class Owned:
    """Vectors with an owner each, of a use of a parameter.

    Args:
        kind: What the gradient is made of: outer products, rows of a table, or gradients of the parameter's shape.
        views: What leads from the parameter to what was used.
        values: Inputs (N, m), ids (N,), or gradients (N, ...).
        gradients: Gradients of what came out, (N, n); None for `per_example`.
        owners: The example of each vector, shape (N,).
    """

    kind: Literal["outer", "table", "per_example"]
    views: tuple[View, ...]
    values: Tensor
    gradients: Tensor | None
    owners: Tensor


@final
@dataclass(eq=False)
class Constant:
    """What a term of the loss that does not depend on the batch adds to the gradient: no noise.

    Args:
        views: What leads from the parameter to what was used.
        gradient: Of the complete loss, of the shape of the parameter.
    """

    views: tuple[View, ...]
    gradient: Tensor


# What is recorded of a parameter.
Record = Use | Owned | Constant


def outer(views: tuple[View, ...], inputs: Rows, gradients: Rows) -> Use | Owned:
    """A use as a linear map: the gradient of an example is the sum over its vectors of gradient times input."""
    if inputs.owners is None:
        return Outer(views, inputs.values, gradients.values)
    return Owned("outer", views, inputs.values, gradients.values, inputs.owners)


def table(views: tuple[View, ...], ids: Rows, gradients: Rows) -> Use | Owned:
    """A use as a table of which rows are read."""
    if ids.owners is None:
        return TableRows(views, ids.values, gradients.values)
    return Owned("table", views, ids.values, gradients.values, ids.owners)


def per_example(views: tuple[View, ...], gradients: Rows) -> Use | Owned:
    """A use as it is: the gradient of an example is the sum of its vectors."""
    values, owners = gradients
    if owners is None:
        return PerExample(views, values.sum(1) if values.shape[1] > 1 else values[:, 0])
    return Owned("per_example", views, values, None, owners)


def joined(uses: Sequence[Record], size: int) -> list[Use]:
    """All uses by example: vectors with owners are sorted, and uses of a kind become one.

    Args:
        uses: What was recorded of a parameter; constants are left out.
        size: Number of examples B.

    Returns:
        Uses of B examples each.
    """
    result: list[Use] = [use for use in uses if isinstance(use, Use)]
    groups: dict[tuple[str, tuple[View, ...]], list[Owned]] = {}
    for use in uses:
        if isinstance(use, Owned):
            groups.setdefault((use.kind, use.views), []).append(use)
    for (kind, views), parts in groups.items():
        owners = torch.cat([part.owners for part in parts])
        values = torch.cat([part.values for part in parts])
        if kind == "per_example":
            stack = values.new_zeros(size, *values.shape[1:])
            result.append(PerExample(views, stack.index_add_(0, owners, values)))
            continue
        gradients = torch.cat([part.gradients for part in parts if part.gradients is not None])
        by_example = [_by_example(stack, owners, size) for stack in (values, gradients)]
        result.append((Outer if kind == "outer" else TableRows)(views, *by_example))
    maps = [use for use in result if type(use) is Outer and not use.native]
    for use in maps[1:]:
        if use.views == maps[0].views and use.inputs.dtype == maps[0].inputs.dtype:
            maps[0].inputs = torch.cat([maps[0].inputs, use.inputs], 1)
            maps[0].outputs = torch.cat([maps[0].outputs, use.outputs], 1)
            result.remove(use)
    return result


def _by_example(values: Tensor, owners: Tensor, size: int) -> Tensor:
    """Vectors (N, ...) as (B, T, ...), T being the most that an example has; zeros where it has fewer."""
    order = torch.argsort(owners, stable=True)
    sorted_owners = owners[order]
    counts = torch.bincount(owners, minlength=size)
    place = torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts)[sorted_owners]
    stack = values.new_zeros(size, max(1, int(counts.max())), *values.shape[1:])
    stack[sorted_owners, place] = values[order]
    return stack
