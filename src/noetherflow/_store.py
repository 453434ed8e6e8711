"""Results as files: a safetensors file whose metadata hold JSON and a checksum.

| entry of the metadata | value |
|---|---|
| `noetherflow` | JSON: kind (class), format (version), versions, and the result as `_codec` writes it |
| `sha256` | the digest of that JSON and of all tensors: keys, dtypes, shapes, bytes |
| `run` | the hash of the run of which this is the result; only if a hash was given |

safetensors checks that a file is complete; the checksum shows whether a number was changed. A file names no code, and
nothing is unpickled. A file is read completely and checked before an object is returned.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from noetherflow import _files, _fingerprint, _versions
from noetherflow._codec import Misfit, codec_of, shown
from noetherflow._errors import FileError, NoetherflowError

T = TypeVar("T")
# Version of the format. Raise it by 1 with every change after which an older release would misread a file.
_FORMAT = 1
_AGAIN = "save the result again"
_JSON, _DIGEST, _RUN = "noetherflow", "sha256", "run"


def save(result: object, path: str | Path, run: str = "") -> None:
    """Write a result to a file, completely or not at all.

    Args:
        result: An object of a class that `_codec` can describe. Tensors are written from any device.
        path: The file; missing folders are created.
        run: The hash of the run; `run_of` reads it back.

    Raises:
        FileError: If a part of the result has no form in a file, or if the file cannot be written.
    """
    kind = type(result).__name__
    tensors = _Tensors()
    try:
        tree = codec_of(type(result)).encode(result, kind, tensors.put)
        versions = _versions.versions()
        text = json.dumps({"kind": kind, "format": _FORMAT, "versions": versions, "result": tree}, allow_nan=False)
        with _files.atomic(path) as temporary:
            metadata = {_JSON: text, _DIGEST: _digest(text, tensors.by_key)} | ({_RUN: run} if run else {})
            save_file(tensors.by_key, temporary, metadata)
    except (Misfit, OSError, ValueError, SafetensorError) as error:
        raise FileError(_line(f"{path}: the {kind} cannot be saved there: {error}")) from error


def load(kind: type[T], path: str | Path, check: Callable[[T], None] | None = None) -> T:
    """Read a result that `save` wrote.

    Args:
        kind: The class of the result.
        path: The file.
        check: A function that raises if the parts of the result do not belong together.

    Returns:
        The result; its tensors are on the CPU and share no memory.

    Raises:
        FileError: If there is no such file, or if it does not hold a complete, undamaged result of this class that this
            release can read. The message is one sentence.
    """
    hint: Any = kind
    try:
        content, tensors = _read(path, kind.__name__)
        result: T = codec_of(hint).decode(content["result"], kind.__name__, lambda key: tensors.pop(key, None))
        _require_consistent(result, tensors, check)
    except OSError as error:
        raise FileError(_line(f"{path} cannot be read: {error}; check the path and its permissions")) from error
    except NoetherflowError as error:
        expected = f"expected a file written by {kind.__name__}.save"
        raise FileError(_line(f"{path} cannot be loaded: {error}; {expected}")) from error
    return result


def run_of(path: str | Path) -> str:
    """The hash of the run that wrote a file; empty if there is no such file, or if the file holds no hash."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return str((file.metadata() or {}).get(_RUN, ""))
    except (OSError, SafetensorError):
        return ""


class _Tensors:
    """The tensors of a file by key."""

    def __init__(self) -> None:
        self.by_key: dict[str, Tensor] = {}
        self._storages: set[int] = set()

    def put(self, where: str, tensor: Tensor) -> str:
        """Store a tensor as a dense, contiguous tensor on the CPU that shares no memory; returns its key."""
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            raise Misfit(f"{where} is a tensor of layout {tensor.layout} on {tensor.device}, expected a dense tensor")
        if tensor.dtype is torch.complex128:
            raise Misfit(f"{where} is a tensor of complex128, which safetensors does not know")
        dense = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        # safetensors refuses tensors that share memory.
        if dense.untyped_storage().data_ptr() in self._storages:
            dense = dense.clone()
        self._storages.add(dense.untyped_storage().data_ptr())
        # The place in the result tells other programs what the tensor is; the number makes the key unique.
        key = f"{len(self.by_key)} {where}".encode("ascii", "backslashreplace").decode()
        self.by_key[key] = dense
        return key


def _read(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON and the tensors of a file; raises `Misfit` unless the file holds an undamaged result of a class."""
    if not Path(path).is_file():
        raise Misfit("it is a folder or a device" if Path(path).exists() else "there is no such file, correct the path")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if not {_JSON, _DIGEST} <= metadata.keys():
                raise Misfit("it is a safetensors file of another program")
            content = _content(metadata[_JSON], kind)
            # Copies, because safetensors returns views of the file, which another program may overwrite.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise Misfit(f"it is truncated, damaged or of another kind ({error}), {_AGAIN}") from error
    if _digest(metadata[_JSON], tensors) != metadata[_DIGEST]:
        raise Misfit(f"it is damaged, as its contents do not have the checksum written with them, {_AGAIN}")
    return content, tensors


def _content(text: str, kind: str) -> dict[str, Any]:
    """The JSON of a file; raises `Misfit` unless it describes a result of a class in a format of this release."""
    try:
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise Misfit(f"it is damaged, as its description is not JSON ({error}), {_AGAIN}") from error
    if not isinstance(content, dict) or content.keys() != {"kind", "format", "versions", "result"}:
        raise Misfit(f"it is damaged, as its description has not the entries kind, format, versions, result, {_AGAIN}")
    version = content["format"]
    if type(version) is not int or version < 1:
        raise Misfit(f"it is damaged, as its format is {shown(version)} and not a number from 1, {_AGAIN}")
    if version > _FORMAT:
        raise Misfit(f"it has format {version} and this release reads {_FORMAT} or less, upgrade noetherflow")
    if content["kind"] != kind:
        raise Misfit(f"it holds a result of the class {shown(content['kind'])}, load it with that class")
    return content


def _require_consistent(result: T, left: dict[str, Tensor], check: Callable[[T], None] | None) -> None:
    """Raise `Misfit` if a result refers to fewer tensors than its file holds, or if its parts do not fit together."""
    if left:
        raise Misfit(f"no place refers to the tensors {', '.join(map(shown, left))}")
    try:
        if check is not None:
            check(result)
    except Exception as error:  # the checks of a user's symmetry may raise any exception
        raise Misfit(str(error) or type(error).__name__) from error


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    """The SHA-256 of the JSON and of the key, dtype, shape and bytes of every tensor."""
    digest = hashlib.sha256(json.dumps(text).encode())
    for key in sorted(tensors):
        _fingerprint.add_tensor(digest, key, tensors[key])
    return digest.hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The entries of a JSON object; raises ValueError if a key occurs twice."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("an entry is there twice")
    return entries


def _refuse(name: str) -> float:
    """Raise for the constants NaN and Infinity, which Python reads although JSON does not have them."""
    raise ValueError(f"{name} is not JSON")


def _line(message: str) -> str:
    """A message on one line."""
    return " ".join(message.splitlines())
