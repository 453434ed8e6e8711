"""The three types that every other file uses: parameters, a batch, a loss."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

Params = Mapping[str, Tensor]
"""Tensors keyed by `named_parameters()` names: parameters, gradients and displacements all have this shape."""

Batch = Any
"""Whatever a DataLoader yields: a tensor, or tensors in tuples, lists, mappings or dataclasses."""

Loss = Callable[[nn.Module, Batch], Tensor]
"""`loss(model, batch)` returns one loss per example, shape (B,): what you train with, `reduction="none"`."""
