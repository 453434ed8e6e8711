"""The experiments of the paper at reduced size: every claim holds, and every band excludes the listed mistakes."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

import noetherflow as nf
from noetherflow.paper import experiment, measure
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


def test_a_claim_without_a_number_does_not_hold() -> None:
    assert not Claim("nothing", predicted=1.0, measured=math.nan, low=0.0).holds
    assert Claim("edge", predicted=1.0, measured=0.5, low=0.5, high=0.5).holds
    assert not Claim("over", predicted=1.0, measured=0.6, high=0.5).holds
    assert not Claim("under", predicted=1.0, measured=0.4, low=0.5).holds


def test_statistics_of_claims() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    # Mean 4, squared gaps 9 + 4 + 0 + 25 = 38, variance 38 / 3, over 4 values.
    assert measure.standard_error(values) == pytest.approx((38 / 3 / 4) ** 0.5)
    assert math.isnan(measure.standard_error(values[:1]))
    x, y = torch.tensor([0.0, 1.0, 2.0, 3.0]).double(), torch.tensor([1.0, 3.0, 2.0, 6.0]).double()
    # Gaps of x are -1.5, -0.5, 0.5, 1.5: sums 7 of products and 5 of squares; those of y are -2, 0, -1, 3, squares 14.
    assert measure.slope(x, y) == pytest.approx(7 / 5)
    assert measure.r_squared(x, y) == pytest.approx(7**2 / (5 * 14))
    assert measure.geometric((1.0, 8.0), 4).tolist() == pytest.approx([1.0, 2.0, 4.0, 8.0])


@pytest.mark.parametrize(
    ("low", "high", "inside", "outside", "said"),
    [
        (0.5, 1.5, (0.5, 1.0, 1.5), (0.49, 1.51, math.nan, math.inf), "[0.5, 1.5]"),
        (None, 1.5, (-9.0, 1.5), (1.51, math.nan), "<= 1.5"),
        (0.5, None, (0.5, 9.0), (0.49, -math.inf, math.nan), ">= 0.5"),
        (0.0, None, (0.0, 1e-300), (-1e-300, math.nan), ">= 0"),
    ],
)
def test_a_band_and_what_it_admits(
    low: float | None, high: float | None, inside: tuple[float, ...], outside: tuple[float, ...], said: str
) -> None:
    claim = Claim("so", predicted=1.0, measured=1.0, low=low, high=high)
    assert [claim.admits(value) for value in inside] == [True] * len(inside)
    assert [claim.admits(value) for value in outside] == [False] * len(outside)
    assert claim.band == said


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
