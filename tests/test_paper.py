"""The experiments of the paper at reduced size: every claim holds, and every band excludes the listed mistakes."""

import dataclasses
import math
from pathlib import Path

import pytest

import noetherflow as nf
from noetherflow.paper import experiment
from noetherflow.paper.claim import Claim
from noetherflow.paper.curves import panels_of
from paper_runs import outcome


def claims(name: str) -> list[Claim]:
    return experiment.load(name).claims(*outcome(name))


@pytest.mark.parametrize("name", experiment.FIGURES)
def test_every_claim_holds(name: str) -> None:
    failed = [f"{claim.text}: {claim.measured} not in {claim.band}" for claim in claims(name) if not claim.holds]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("name", experiment.FIGURES)
def test_every_band_excludes_the_listed_mistakes(name: str) -> None:
    mistakes = [(claim, mistake, value) for claim in claims(name) for mistake, value in claim.wrong.items()]
    assert mistakes
    admitted = [f"{claim.text} admits {text}: {value}" for claim, text, value in mistakes if claim.admits(value)]
    assert not admitted, "\n".join(admitted)


@pytest.mark.parametrize("name", experiment.FIGURES)
def test_the_picture_can_be_drawn(name: str, tmp_path: Path) -> None:
    figure = experiment.load(name).plot(*outcome(name))
    figure.savefig(tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()
    panels = panels_of(figure)
    assert bool(panels) == (name != "f6")  # f6 shows images
    labels = [text for panel in panels for text in (panel.title, panel.x_label, panel.y_label)]
    labels += [str(curve.group) for panel in panels for curve in panel.curves]
    assert not [text for text in labels if set("\\$^{}") & set(text)]


@pytest.mark.parametrize("name", experiment.FIGURES)
def test_settings_of_the_full_size_are_the_published_ones(name: str) -> None:
    config = experiment.load(name).Config()
    published = {
        "f1": {"lr": 0.05, "batch_size": 1, "steps": 20_000, "replicas": 64, "weight_decay": 2e-3},
        "f2": {"inputs": 32, "outputs": 28, "hidden": 4, "lr": 0.01, "batch_size": 32, "steps": 40_000, "replicas": 8},
        "f3": {"width": 10, "hidden": 2, "small": 0.1, "batch_size": 16, "lr_times_trace": 0.15, "steps": 40_000},
        "f4": {"inputs": 20, "outputs": 30, "lr": 0.008, "warmup_lr": 0.001, "warmup_steps": 20_000, "steps": 50_000},
        "f5": {"inputs": 8, "hidden": 16, "outputs": 2, "examples": 64, "lr": 0.05, "steps": 4_000, "replicas": 8},
        "f6": {"inputs": 6, "hidden": 8, "outputs": 6, "scale": 0.3, "lr": 0.02, "steps": 40_000, "replicas": 16},
        "f7": {"inputs": 10, "outputs": 12, "lr": 0.006, "batch_size": 4, "displacement": 0.3, "replicas": 64},
        "f8": {"depths": (3, 4, 5), "width": 4, "lr": 0.005, "batch_size": 1, "steps": 200_000, "replicas": 8},
        "f9": {"size": 3, "hidden": 2},
    }
    for setting, value in published[name].items():
        assert getattr(config, setting) == value


def test_a_claim_without_a_number_does_not_hold() -> None:
    assert not Claim("nothing", predicted=1.0, measured=math.nan, low=0.0).holds
    assert Claim("edge", predicted=1.0, measured=0.5, low=0.5, high=0.5).holds
    assert not Claim("over", predicted=1.0, measured=0.6, high=0.5).holds
    assert not Claim("under", predicted=1.0, measured=0.4, low=0.5).holds


def test_overrides_of_settings() -> None:
    configs = experiment.configure(
        ["f1", "f2"], quick=True, seed=7, overrides=["lr=0.2", "f1.steps=10", "variances=3,2", "f2.batch_size=4"]
    )
    assert configs["f1"].lr == configs["f2"].lr == 0.2
    assert configs["f1"].steps == 10 != configs["f2"].steps
    assert configs["f1"].variances == (3.0, 2.0)
    assert (configs["f1"].seed, configs["f2"].seed) == (7, 7)
    assert (configs["f1"].batch_size, configs["f2"].batch_size) == (1, 4)


@pytest.mark.parametrize(
    ("override", "words"),
    [("lr", "NAME=VALUE"), ("speed=3", "no chosen figure"), ("f2.angle=1", "no chosen figure"), ("steps=many", "int")],
)
def test_an_invalid_override_is_refused(override: str, words: str) -> None:
    with pytest.raises(nf.SettingsError, match=words):
        experiment.configure(["f1", "f2"], quick=True, seed=None, overrides=[override])


def test_a_figure_that_does_not_exist_is_refused() -> None:
    with pytest.raises(nf.SettingsError, match="f1, f2"):
        experiment.choose(["f99"])
    assert experiment.choose(["F2"]) == ["f2"]
    assert experiment.choose([]) == list(experiment.FIGURES)


def test_equal_seeds_give_equal_numbers() -> None:
    def measured(seed: int) -> list[float]:
        module = experiment.load("f1")
        config = dataclasses.replace(module.Config.quick(), steps=200, replicas=2, kicks=50, seed=seed)
        return [claim.measured for claim in module.claims(config, module.run(config))]

    assert measured(1) == measured(1)
    assert measured(1) != measured(2)
