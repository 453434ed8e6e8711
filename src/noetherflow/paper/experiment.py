"""What an experiment is, which there are, and their settings from the outside."""

import dataclasses
import importlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from matplotlib.figure import Figure

from noetherflow._errors import SettingsError
from noetherflow.paper.claim import Claim

# Every figure, by the module that reproduces it.
FIGURES = {
    "f1": "f1_scale_invariance",
    "f2": "f2_matrix_factorisation",
    "f3": "f3_data_covariance",
    "f4": "f4_warmup",
    "f5": "f5_scaling",
    "f6": "f6_representations",
    "f7": "f7_speed",
    "f8": "f8_deep_linear",
    "f9": "f9_gauge_drag",
}


class Experiment(Protocol):
    """What a file of this folder defines. `Config` is a frozen dataclass with a `seed` and a reduced `quick()`."""

    TITLE: str
    Config: Any

    def run(self, config: Any) -> Any:
        """Simulate; returns whatever `plot` and `claims` need."""

    def plot(self, config: Any, outcome: Any) -> Figure:
        """The picture."""

    def claims(self, config: Any, outcome: Any) -> list[Claim]:
        """The verdicts."""


def choose(names: Sequence[str]) -> list[str]:
    """The figures asked for, in order; all for none.

    Returns:
        Their names.

    Raises:
        SettingsError: If there is no such figure.
    """
    unknown = [name for name in names if name.lower() not in FIGURES]
    if unknown:
        raise SettingsError(f"there is no figure {unknown}; there are {', '.join(FIGURES)}")
    return [name.lower() for name in names] or list(FIGURES)


def title(name: str) -> str:
    """The question an experiment asks, in a line."""
    return load(name).TITLE


def configure(names: Sequence[str], *, quick: bool, seed: int | None, overrides: Sequence[str]) -> dict[str, Any]:
    """The settings of each experiment, with overrides such as `lr=0.1` (every figure that has it) or `f1.lr=0.1`.

    Returns:
        A `Config` per figure.

    Raises:
        SettingsError: If an override is not of that form, names no setting, or its value does not fit.
    """
    configs = {name: load(name).Config.quick() if quick else load(name).Config() for name in names}
    if seed is not None:
        configs = {name: dataclasses.replace(config, seed=seed) for name, config in configs.items()}
    for override in overrides:
        target, equals, text = override.partition("=")
        figure, _, setting = target.rpartition(".")
        if not equals or not setting:
            raise SettingsError(f"--set takes NAME=VALUE or FIGURE.NAME=VALUE, got {override!r}")
        having = [name for name, config in configs.items() if hasattr(config, setting) and figure in ("", name)]
        if not having:
            known = {name: [field.name for field in dataclasses.fields(config)] for name, config in configs.items()}
            raise SettingsError(f"--set {override}: no chosen figure has that setting; there are {known}")
        for name in having:
            value = _parse(text, getattr(configs[name], setting), override)
            configs[name] = dataclasses.replace(configs[name], **{setting: value})
    return configs


def command(name: str, config: Any, out: Path, *, quick: bool) -> str:
    """What a shell runs to do the same again: every setting that is not the one it starts from is said.

    Returns:
        A line to paste.
    """
    start = load(name).Config.quick() if quick else load(name).Config()
    words = ["noetherflow", "reproduce", name, *(["--quick"] if quick else [])]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == getattr(start, field.name):
            continue
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words += ["--seed", text] if field.name == "seed" else ["--set", f"{field.name}={text}"]
    return shlex.join([*words, "--out", str(out)])


def load(name: str) -> Experiment:
    """The module of a figure."""
    return importlib.import_module(f"noetherflow.paper.{FIGURES[name]}")


def _parse(text: str, current: Any, override: str) -> Any:
    """A value of the type that the setting has now."""
    if isinstance(current, tuple):
        return tuple(_parse(part, current[0], override) for part in text.split(","))
    try:
        if isinstance(current, bool):
            return {"true": True, "false": False}[text.lower()]
        return type(current)(text)
    except (KeyError, ValueError):
        raise SettingsError(f"--set {override}: expected a {type(current).__name__} such as {current!r}") from None
