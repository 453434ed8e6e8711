"""The file of a user that the command line runs: the function `build()` and the code on which its result depends."""

import importlib.util
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from noetherflow._errors import UserFileError
from noetherflow.optimizers import Optimizer, require_settings

Built = tuple[nn.Module, Any, Any, Optimizer, Mapping[str, Any] | None]
"""Model, loss, loader, settings of the optimizer, and symmetries, which are None if `build()` declares none."""

# The files of this package and of PyTorch have their version in the key of a run.
_KNOWN = {"noetherflow", "torch"}


def load_build(file: Path) -> Built:
    """Run the function `build()` of a user's file and check its result.

    Args:
        file: A Python file.

    Returns:
        Model, loss, loader, settings of the optimizer, and symmetries, which are None if `build()` declares none.

    Raises:
        UserFileError: If there is no such file or function, or if its result has different types.
    """
    if not file.is_file():
        raise UserFileError(f"there is no file {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise UserFileError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # The file may import files beside it, as a script may; worker processes of a DataLoader import the file by name.
    sys.path.insert(0, str(file.parent.resolve()))
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    build = getattr(module, "build", None)
    expected = "build() -> (model, loss, loader, settings) or (model, loss, loader, settings, symmetries)"
    if not callable(build):
        raise UserFileError(f"{file} does not define {expected}; see examples/digits_mlp.py")
    built = build()
    if not isinstance(built, (tuple, list)) or len(built) not in (4, 5):
        size = f" of length {len(built)}" if isinstance(built, (tuple, list)) else ""
        raise UserFileError(f"{file}: expected {expected}, got {type(built).__name__}{size}")
    model, loss, loader, settings, declared = built if len(built) == 5 else (*built, None)
    if isinstance(settings, torch.optim.Optimizer):
        require_settings(settings)  # raises, and says how to read the settings
    checks = (
        ("model", model, isinstance(model, nn.Module), "a torch.nn.Module"),
        ("loss", loss, callable(loss), "a function (model, batch) -> one loss per example"),
        ("loader", loader, hasattr(loader, "__iter__"), "a DataLoader or another iterable of batches"),
        ("settings", settings, isinstance(settings, Optimizer), "a noetherflow.SGD or AdamW"),
        (
            "symmetries",
            declared,
            declared is None or isinstance(declared, Mapping),
            "a mapping from names to symmetries",
        ),
    )
    for name, value, valid, description in checks:
        if not valid:
            raise UserFileError(f"{file}: build() must return {description} as {name}, got {type(value).__name__}")
    return model, loss, loader, settings, declared


def sources(file: Path, model: nn.Module) -> list[Path]:
    """The files of Python code on which the result of `build()` depends, as far as a program can tell.

    Modules that the loss imports only when it runs are left out.

    Args:
        file: The user's file, after `load_build`.
        model: The model that `build()` returned.

    Returns:
        The file, the modules imported from its folder, and the files of the classes of the model's modules, sorted.
    """
    folder, library = file.parent.resolve(), Path(sysconfig.get_paths()["stdlib"])
    paths = {file.resolve()}
    classes = {type(module).__module__ for module in model.modules()}
    for name, module in [*sys.modules.items()]:
        origin = getattr(module, "__file__", None)
        if name.partition(".")[0] in _KNOWN or not isinstance(origin, str) or not origin.endswith(".py"):
            continue
        path = Path(origin).resolve()
        installed = "site-packages" in path.parts or path.is_relative_to(library)
        if name in classes or (path.is_relative_to(folder) and not installed):
            paths.add(path)
    return sorted(path for path in paths if path.is_file())
