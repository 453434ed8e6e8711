"""Random layouts of examples and tokens: every way of measuring noise is right or refuses, and is never wrong."""

from collections import Counter
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import Phase

from noetherflow.noise.capture.layouts import Regular
from noise_ways import EXACT, FAST, MEASURE, NAMED, REFUSED, RIGHT, TRAIN, Row, outcome
from random_layouts import LAYOUTS, OPERATIONS, PARTS, Plan, Sizes, losses, plans, tokens_first

# Of the steps of a meter, the share that has to be measured: a meter that refuses everything is never wrong.
MEASURED = 0.5


def of(plan: Plan) -> Row:
    allowed = {RIGHT, NAMED, REFUSED}
    expected = {TRAIN: allowed, MEASURE: allowed}
    # Two examples that are drawn alike have no noise but that of rounding, and a meter says so.
    return Row(plan.build, losses, plan.batches, expected=expected, says="rounding hides it")


def never_wrong(way: str, count: int) -> Counter[str]:
    """Draw models; raises AssertionError for a wrong number, and any error that is not the package's own."""
    seen: Counter[str] = Counter()

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(plans())
    def draw(plan: Plan) -> None:
        row = of(plan)
        result = outcome(row, way)
        assert result in row.allowed(way), result
        seen[result] += 1

    draw()
    return seen


def ways(count: int, *marks: Any) -> list[Any]:
    made = []
    for way in (EXACT, FAST, TRAIN, MEASURE):
        made.append(pytest.param(way, count, marks=marks, id=f"{way}-{count}"))
    return made


@pytest.mark.parametrize(("way", "count"), [*ways(200), *ways(1000, pytest.mark.slow)])
def test_no_layout_gives_a_wrong_number(way: str, count: int) -> None:
    seen = never_wrong(way, count)
    assert seen[RIGHT] + seen[NAMED] >= MEASURED * seen.total(), seen


def plan_of(part: Any, examples: int = 6, tokens: int = 6) -> Plan:
    sizes = Sizes(examples, tokens, heads=3, depth=2, classes=3, experts=3, window=3 if tokens % 3 == 0 else 1)
    return Plan(sizes, True, (part,), "examples first", 0)


def name_of(part: Any) -> str:
    return part if isinstance(part, str) else "-".join(piece.__name__ for piece in part)


@pytest.mark.parametrize("part", [*((layout, OPERATIONS[0]) for layout in LAYOUTS), *PARTS], ids=name_of)
def test_every_part_is_measured_by_single_examples(part: Any) -> None:
    """Every part has independent examples: what is refused above is not refused for a fault of the part."""
    assert outcome(of(plan_of(part, 4, 6)), EXACT) == RIGHT


def test_examples_that_mix_are_refused() -> None:
    """A part that mixes examples, where the oracle takes examples one by one, is no row of this table."""
    plan = plan_of((LAYOUTS[0], OPERATIONS[0]))

    def mixed(model: Any, batch: Any) -> torch.Tensor:
        values = losses(model, batch)
        return values + 1e-3 * values.square().roll(1, 0)

    row = Row(plan.build, mixed, plan.batches, exact_loss=losses)
    assert outcome(row, TRAIN) == REFUSED


def test_a_wrong_layout_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of the draws: tokens that come first are taken for examples."""
    plan = plan_of((tokens_first, OPERATIONS[0]), 4, 4)
    monkeypatch.setattr("noetherflow.noise.capture.placing.Places.of", lambda *given: [Regular(0)] * len(given[-1]))
    with pytest.raises(AssertionError):
        outcome(of(plan), TRAIN)
