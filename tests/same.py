"""Equality to the last bit, of anything that a result can hold; written without a look at how results are stored."""

import struct
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor


def differences(a: Any, b: Any, where: str = "result") -> Iterator[str]:
    """The places at which two values differ: in type, order, shape, dtype or bits."""
    if type(a) is not type(b):
        yield f"{where}: {type(a).__name__} and {type(b).__name__}"
    elif isinstance(a, Tensor):
        if (a.dtype, a.shape, a.device) != (b.dtype, b.shape, b.device) or bits(a) != bits(b):
            yield where
    elif isinstance(a, Mapping):
        if list(a) != list(b):
            yield f"{where}: {list(a)} and {list(b)}"
        else:
            for key in a:
                yield from differences(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            yield f"{where}: lengths {len(a)} and {len(b)}"
        for index, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from differences(x, y, f"{where}[{index}]")
    elif a is None or isinstance(a, (bool, int, str, Enum, torch.dtype)):
        if a != b:
            yield f"{where}: {a!r} and {b!r}"
    else:
        if isinstance(a, float) and struct.pack(">d", a) != struct.pack(">d", b):
            yield f"{where}: {a!r} and {b!r}"
        if not isinstance(a, float) or type(a) is not float:
            yield from differences(vars(a), vars(b), where)


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8).tolist())


def require_same(a: Any, b: Any) -> None:
    assert not list(differences(a, b))
