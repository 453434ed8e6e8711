"""Batches of any shape: taken apart into their tensors and put together again."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from noetherflow._errors import EmptyDataError, SettingsError
from noetherflow._types import Batch


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Apply a function to every tensor of a batch, keeping the containers and their types.

    Tuples, named tuples, lists, mappings (a `BatchEncoding` too) and dataclasses are entered; anything else is
    returned unchanged.

    Returns:
        A batch of this structure.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        mapped = {key: map_tensors(function, value) for key, value in batch.items()}
        return mapped if type(batch) is dict else _rebuild(type(batch), mapped)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, value) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_tensors(function, value) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch) if field.init}
        return dataclasses.replace(batch, **{name: map_tensors(function, value) for name, value in fields.items()})
    return batch


def tensors_of(batch: Batch) -> list[Tensor]:
    """The tensors of a batch, in the order `map_tensors` meets them."""
    tensors: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    map_tensors(collect, batch)
    return tensors


def length_of(batch: Batch) -> int:
    """How many examples a batch has: the leading dimension of its first tensor that has one, or 0."""
    return next((len(tensor) for tensor in tensors_of(batch) if tensor.ndim), 0)


def leaves_of(batch: Batch) -> Iterator[Any]:
    """The tensors of a batch and every value that `map_tensors` leaves as it is, such as text, in order."""
    if isinstance(batch, Mapping):
        for key, value in batch.items():
            yield key
            yield from leaves_of(value)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from leaves_of(value)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from leaves_of(getattr(batch, field.name))
    else:
        yield batch


def with_tensors(batch: Batch, tensors: list[Tensor]) -> Batch:
    """The batch with its tensors replaced, in the order of `tensors_of`."""
    supply = iter(tensors)
    return map_tensors(lambda _: next(supply), batch)


def cast(batch: Batch, dtype: torch.dtype | None, device: torch.device) -> Batch:
    """The batch on a device, its floating-point tensors in a dtype (or as they are, for None), complex alike."""

    def converted(tensor: Tensor) -> Tensor:
        if dtype is not None and tensor.is_complex():
            return tensor.to(device, dtype.to_complex())
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    return map_tensors(converted, batch)


def select(batch: Batch, index: Tensor, size: int) -> Batch:
    """The examples `index` of a batch of `size` examples; tensors without that leading dimension are shared by all."""
    return map_tensors(lambda t: t[index] if is_per_example(t, size) else t, batch)


def peek(loader: Iterable[Batch]) -> tuple[Batch, Iterable[Batch]]:
    """The first batch of a loader, and an iterable over all its batches.

    A loader that can be gone through again is returned as it is; an iterator, which cannot, gets its first batch back.

    Returns:
        The first batch, and all batches.

    Raises:
        EmptyDataError: If the loader yields nothing.
    """
    batches = iter(loader)
    for first in batches:
        return first, itertools.chain([first], batches) if batches is loader else loader
    raise EmptyDataError(
        f"the loader yielded no batch: {loader!r}. Is the data set empty, or smaller than a batch with drop_last=True?"
    )


def hold_out(batches: Iterable[Batch], share: float, least: int = 1) -> tuple[list[Batch], list[Batch]]:
    """Divide the batches of a loader into those that are used and those that are held out; both are kept in memory.

    Args:
        batches: The batches.
        share: The share of the batches that is held out, the last of them.
        least: The smallest number of batches of both parts.

    Returns:
        The batches that are used, and those that are held out.

    Raises:
        SettingsError: If the share does not lie between 0 and 1.
        EmptyDataError: If too few batches are left to use.
    """
    if not 0 < share < 1:
        raise SettingsError(f"the share of batches that is held out must lie between 0 and 1, got {share}")
    kept = list(batches)
    held = max(least, round(share * len(kept)))
    if len(kept) - held < least:
        raise EmptyDataError(
            f"holding out {held} of {len(kept)} batches leaves {max(0, len(kept) - held)} to use, expected {least} or "
            f"more: use smaller batches or a smaller share"
        )
    return kept[:-held], kept[-held:]


def read(loader: Iterable[Batch], what: str) -> list[Batch]:
    """All batches of a loader.

    Args:
        loader: The loader.
        what: Subject of the message.

    Returns:
        The batches, one or more.

    Raises:
        SettingsError: If the loader is no iterable of batches: a mapping is a single batch, a data set yields examples.
        EmptyDataError: If the loader yields nothing.
    """
    if isinstance(loader, Mapping) or not isinstance(loader, Iterable):
        raise SettingsError(
            f"{what} must be an iterable of batches, such as a DataLoader or a list, got {type(loader).__name__}; a "
            "data set goes into a DataLoader, and a single batch into a list: [batch]"
        )
    result = list(loader)
    if not result:
        raise EmptyDataError(
            f"{what} yielded no batch: {loader!r}. Is the data set empty, or smaller than a batch with drop_last=True?"
        )
    return result


def is_per_example(tensor: Tensor, size: int) -> bool:
    """Whether a tensor of a batch has an entry per example: a leading dimension of the batch size."""
    return tensor.ndim > 0 and tensor.shape[0] == size


def _rebuild(kind: type, mapped: dict[Any, Any]) -> Any:
    try:
        return kind(mapped)
    except TypeError:
        return mapped
