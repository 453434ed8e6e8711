"""The interface of an experiment, the list of experiments, and their settings from the command line."""

import dataclasses
import importlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from matplotlib.figure import Figure

from noetherflow._errors import SettingsError
from noetherflow.paper.claim import Claim

# Name of a figure: module with its TITLE, Config, run, plot and claims.
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
    "f10": "f10_adamw",
    "f12": "f12_forecast",
}


class Experiment(Protocol):
    """The names that the module of a figure defines.

    `Config` is a frozen dataclass with a field `seed` and a class method `quick()`, which returns reduced sizes.
    """

    TITLE: str
    Config: Any

    def run(self, config: Any) -> Any:
        """Simulate, and return the input of `plot` and `claims`."""

    def plot(self, config: Any, outcome: Any) -> Figure:
        """Draw the figure."""

    def claims(self, config: Any, outcome: Any) -> list[Claim]:
        """Compare prediction and measurement."""


def choose(names: Sequence[str]) -> list[str]:
    """Check the names of figures.

    Args:
        names: Names such as "f1" or "F1"; empty for all figures.

    Returns:
        The names in lower case, in the order given.

    Raises:
        SettingsError: If a name is not in `FIGURES`.
    """
    unknown = [name for name in names if name.lower() not in FIGURES]
    if unknown:
        raise SettingsError(f"there is no figure {unknown}; the figures are {', '.join(FIGURES)}")
    return [name.lower() for name in names] or list(FIGURES)


def title(name: str) -> str:
    """The title of an experiment."""
    return load(name).TITLE


def configure(names: Sequence[str], *, quick: bool, seed: int | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Build the settings of each experiment.

    Args:
        names: Names of figures.
        quick: Whether to start from the reduced sizes.
        seed: Seed of every experiment; None for the default.
        overrides: Texts `lr=0.1` (for every chosen figure with that setting) or `f1.lr=0.1` (for one figure).

    Returns:
        A `Config` for each figure, by name.

    Raises:
        SettingsError: If an override has another form, names an unknown setting, or has a value of the wrong type.
    """
    configs = {name: load(name).Config.quick() if quick else load(name).Config() for name in names}
    if seed is not None:
        configs = {name: dataclasses.replace(config, seed=seed) for name, config in configs.items()}
    for override in overrides:
        target, equals, text = override.partition("=")
        figure, _, setting = target.rpartition(".")
        if not equals or not setting:
            raise SettingsError(f"--set takes NAME=VALUE or FIGURE.NAME=VALUE, got {override!r}")
        targets = [name for name, config in configs.items() if hasattr(config, setting) and figure in ("", name)]
        if not targets:
            known = {name: [field.name for field in dataclasses.fields(config)] for name, config in configs.items()}
            raise SettingsError(f"--set {override}: no chosen figure has that setting; the settings are {known}")
        for name in targets:
            value = _parse(text, getattr(configs[name], setting), override)
            configs[name] = dataclasses.replace(configs[name], **{setting: value})
    return configs


def command(name: str, config: Any, out: Path, *, quick: bool) -> str:
    """Write the shell command that repeats an experiment.

    Args:
        name: Name of the figure.
        config: Settings of the run. The command lists each setting that differs from its default.
        out: Folder of the results.
        quick: Whether the defaults are the reduced sizes.

    Returns:
        One line for a shell.
    """
    default = load(name).Config.quick() if quick else load(name).Config()
    words = ["noetherflow", "reproduce", name, *(["--quick"] if quick else [])]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == getattr(default, field.name):
            continue
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words += ["--seed", text] if field.name == "seed" else ["--set", f"{field.name}={text}"]
    return shlex.join([*words, "--out", str(out)])


def load(name: str) -> Experiment:
    """Import the module of a figure."""
    return importlib.import_module(f"noetherflow.paper.{FIGURES[name]}")


def _parse(text: str, current: Any, override: str) -> Any:
    """Convert the text of an override to the type of the current value; tuples are separated by commas."""
    if isinstance(current, tuple):
        return tuple(_parse(part, current[0], override) for part in text.split(","))
    try:
        if isinstance(current, bool):
            return {"true": True, "false": False}[text.lower()]
        return type(current)(text)
    except (KeyError, ValueError):
        raise SettingsError(f"--set {override}: expected a {type(current).__name__} such as {current!r}") from None
