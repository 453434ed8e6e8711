"""Hashes of tensors and of code: a result whose hash is that of today can be used again."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def add_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Add the name, dtype, shape and bytes of a tensor to a digest of `hashlib`.

    Args:
        digest: An object with the method `update`.
        name: The name of the tensor.
        tensor: A tensor of any layout on any device.
    """
    dense = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
    numbers: Any = dense.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
    digest.update(numbers)


# Cached: the hash must stay that of the code that this process imported, even if the files change afterwards.
@functools.cache
def of_code(root: Path, excluded: frozenset[str]) -> str:
    """Hash the version of torch and all Python files below a folder except the excluded files.

    Args:
        root: The folder.
        excluded: Files and folders, as paths relative to the root.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not {relative.as_posix(), *(parent.as_posix() for parent in relative.parents)} & excluded:
            digest.update(relative.as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
