"""Analyses that are kept in a file and used again by a run of the same model, data, settings and code.

The key of a run is a hash of everything on which its numbers depend. A loader that shuffles yields its batches in
another order in each run: the key differs, and nothing is used again. Seed the loader's generator in `build()` to use
an analysis again.
"""

import hashlib
import json
import os
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor, nn

from noetherflow import _fingerprint, _store
from noetherflow._analysis import Analysis
from noetherflow._batch import leaves_of
from noetherflow._codec import Misfit, codec_of
from noetherflow._errors import FileError
from noetherflow._progress import track
from noetherflow._types import Batch
from noetherflow.optimizers import Optimizer
from noetherflow.symmetry import Symmetry

# Files and folders of this package that enter no number of an analysis.
_DISPLAY = {
    "_cli.py",
    "_cli_options.py",
    "_cli_outputs.py",
    "__main__.py",
    "_progress.py",
    "_user_file.py",
    "paper",
    "report",
    "simulation",
}


def key_of(
    model: nn.Module,
    loss: Any,
    batches: Iterable[Batch],
    settings: Optimizer,
    symmetries: Mapping[str, Symmetry] | None,
    *,
    options: Mapping[str, Any],
    sources: Sequence[Path],
) -> str:
    """Hash everything on which the numbers of an analysis depend.

    Args:
        model: The model: parameters, buffers, devices, train or eval mode, and text of every module.
        loss: The loss; its parameters and buffers, if it is a module.
        batches: The data; all tensors and other values of every batch, in order.
        settings: The settings of the optimizer.
        symmetries: The declared symmetries; None if they are searched for.
        options: The options of the analysis by name.
        sources: The files of code of the user; their text.

    Returns:
        64 hexadecimal digits.

    Raises:
        SettingsError: If the weight decay of parameter groups belongs to no parameter of the model.
    """
    digest = hashlib.sha256(_fingerprint.of_code(Path(__file__).parent, frozenset(_DISPLAY)).encode())
    # By name: weight decay by parameter group may not say to which parameter it belongs.
    named = repr(settings.named_by(model))
    digest.update(json.dumps([named, sorted(options.items())], default=str).encode())
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for module in (model, loss):
        if isinstance(module, nn.Module):
            _add_module(digest, module)
    if symmetries is not None:
        _add_symmetries(digest, symmetries)
    for number, batch in enumerate(track(batches, "comparing the data with an earlier run")):
        _add_batch(digest, number, batch)
    return digest.hexdigest()


def load(path: Path, key: str) -> Analysis | None:
    """The analysis of a run with this key; None if the file is missing, damaged, or of another run."""
    if _store.run_of(path) != key:
        return None
    try:
        return Analysis.load(path)
    except FileError:
        return None


def save(analysis: Analysis, path: Path, key: str) -> None:
    """Write an analysis and the key of its run to a file, completely or not at all.

    Args:
        analysis: The analysis.
        path: The file.
        key: The key.

    Raises:
        FileError: If a part of the analysis has no form in a file, or if the file cannot be written.
    """
    _store.save(analysis, path, run=key)


def _add_module(digest: Any, module: nn.Module) -> None:
    """Add the text, the mode, the parameters and the buffers of a module."""
    modes = [part.training for part in module.modules()]
    # Addresses differ between runs; what stands at an address comes from code, whose text is in the key.
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(module))
    digest.update(json.dumps([text, modes]).encode())
    # Buffers that `state_dict` leaves out enter the loss, too.
    for named in (module.named_parameters(), module.named_buffers()):
        for name, tensor in named:
            digest.update(json.dumps([tensor.device.type, tensor.requires_grad]).encode())
            _fingerprint.add_tensor(digest, name, tensor)


def _add_symmetries(digest: Any, symmetries: Mapping[str, Symmetry]) -> None:
    """Add the declared symmetries, in the form in which they are written to a file."""

    def put(where: str, tensor: Tensor) -> str:
        _fingerprint.add_tensor(digest, where, tensor)
        return where

    try:
        tree = codec_of(dict[str, Symmetry]).encode(dict(symmetries), "symmetries", put)
    except Misfit:
        # No file can hold an analysis of this symmetry either, so that no run will have this key.
        tree = os.urandom(32).hex()
    digest.update(json.dumps(tree).encode())


def _add_batch(digest: Any, number: int, batch: Batch) -> None:
    """Add the tensors of a batch, and its values of other kinds."""
    for place, leaf in enumerate(leaves_of(batch)):
        where = f"{number} {place}"
        if isinstance(leaf, Tensor):
            _fingerprint.add_tensor(digest, where, leaf)
        elif isinstance(leaf, numpy.ndarray) and leaf.dtype != object:
            digest.update(json.dumps([where, str(leaf.dtype), list(leaf.shape)]).encode() + leaf.tobytes())
        else:
            digest.update(where.encode() + _bytes_of(leaf))


def _bytes_of(value: Any) -> bytes:
    """A value as bytes. The text of an object that cannot be pickled holds its address: the key is then new."""
    try:
        return pickle.dumps(value)
    except Exception:  # a user's class may raise any exception
        return repr(value).encode()
