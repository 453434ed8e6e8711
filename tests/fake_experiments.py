"""Experiments that take no time, for the tests of what runs, keeps and shows them."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from noetherflow.paper import experiment
from noetherflow.paper.claim import Claim


@dataclass(frozen=True)
class Config:
    value: float = 1.0
    sizes: tuple[int, ...] = (1, 2)
    centred: bool = True
    seed: int = 0

    @classmethod
    def quick(cls) -> "Config":
        return cls(value=0.5)


def heat_map(figure: Figure) -> None:
    """A picture that the page can only show as it is."""
    figure.subplots().imshow([[0.0, 1.0]])


@dataclass
class Fake:
    """Stands in for a file of the folder paper/, and counts how often it was run."""

    TITLE: str = "Is a <value> & its double what was said?"
    Config: Any = Config
    extra: tuple[Claim, ...] = ()
    runs: int = 0
    error: BaseException | None = None
    draw: Callable[[Figure], object] = heat_map
    threads: int = 0

    def run(self, config: Config) -> float:
        self.runs += 1
        self.threads = torch.get_num_threads()
        if self.error is not None:
            raise self.error
        return 2 * config.value + config.seed

    def plot(self, config: Config, outcome: float) -> Figure:
        figure = Figure(figsize=(6, 3))
        self.draw(figure)
        return figure

    def claims(self, config: Config, outcome: float) -> list[Claim]:
        return [Claim("twice the value", predicted=1.0, measured=outcome, high=1.5, error=0.25), *self.extra]


def install(monkeypatch: pytest.MonkeyPatch, **fakes: Fake) -> None:
    """Make these all the experiments there are, in this process."""
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, f"noetherflow.paper.fake_{name}", fake)
    monkeypatch.setattr(experiment, "FIGURES", {name: f"fake_{name}" for name in fakes})
