"""What tables and notes say of symmetries without an equilibrium, and of rows on which nothing acts."""

import math

import pytest
import torch
from torch import nn

import noetherflow as nf
from cases import case, squared_error

HIDDEN = {"hidden": nf.DiagonalSymmetry([nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], [nf.Axis("2.weight", 1)])}
UNDECAYED = {"0.weight": 0.0, "0.bias": 0.0, "2.weight": 0.0, "2.bias": 0.0}


def cells(result: object, name: str) -> list[str]:
    """The cells of the row of a symmetry in a printed table."""
    (line,) = (line for line in str(result).splitlines() if line.split()[:1] in ([name], [f"{name}*"]))
    return line.split()[1:]


def with_a_dead_unit() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A net whose hidden unit 1 is dead for all data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[0].bias[1] = -100.0
    return model, [(torch.randn(8, 4).double(), torch.randn(8, 2).double()) for _ in range(4)]


@pytest.mark.parametrize(
    ("optimizer", "nothing", "needed"),
    [
        (nf.AdamW(lr=1e-3, weight_decay=1e-2, batch_size=8), "get no gradient", "noise on both sides gives"),
        (nf.AdamW(lr=1e-3, weight_decay=0.0, batch_size=8), "neither gradient noise nor weight decay", "weight_decay"),
        (nf.AdamW(lr=1e-3, weight_decay=UNDECAYED, batch_size=8), "neither gradient noise nor", "weight_decay > 0"),
        (nf.SGD(0.1, 8), "neither gradient noise nor weight decay", "weight_decay > 0"),
    ],
    ids=["AdamW", "AdamW without decay", "AdamW without decay by name", "SGD"],
)
def test_a_dead_row_is_explained_by_what_is_set(optimizer: nf.SGD | nf.AdamW, nothing: str, needed: str) -> None:
    model, batches = with_a_dead_unit()
    noise = nf.estimate_noise(model, squared_error, batches, HIDDEN, progress=False)
    outcome = nf.solve_equilibrium(noise, optimizer, model).outcomes["hidden"]
    assert outcome.directions == (1,)
    assert nothing in outcome.message
    assert needed in outcome.message
    # The twin: what is not true of these settings is not said.
    other = "get no gradient" if "neither" in nothing else "neither"
    assert other not in outcome.message
    assert ("weight_decay > 0" in outcome.message) == ("neither" in nothing)


def test_weight_decay_of_adamw_moves_no_charge_of_a_dead_row() -> None:
    """AdamW itself: both sides of a dead unit shrink by a factor in common, so that their ratio stays."""
    model, batches = with_a_dead_unit()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-1)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    for batch in batches * 5:
        adamw.zero_grad()
        squared_error(model, batch).mean().backward()
        adamw.step()
    factor = (1 - 1e-3 * 1e-1) ** 20
    for unit, dead in ((1, True), (0, False)):
        for after, old in (
            (model[0].weight[unit], before["0.weight"][unit]),
            (model[2].weight[:, unit], before["2.weight"][:, unit]),
        ):
            assert torch.allclose(after.detach(), factor * old, rtol=1e-12, atol=0) == dead


def test_a_symmetry_without_a_charge_shows_no_distance() -> None:
    one = case("matrix")
    analysis = nf.analyze(one.model, one.loss, one.loader(), nf.AdamW(batch_size=4), one.symmetries, progress=False)
    (report,) = analysis.reports
    assert report.status == "no_charge"
    assert cells(analysis, report.name)[-4:] == ["-"] * 4  # drift, dist, error, steps
    assert cells(analysis.equilibrium, report.name)[-4:] == ["-"] * 4
    assert "not known:" in str(analysis)
    assert "nan" not in str(analysis)
    # The twin: with a charge there are numbers.
    known = nf.analyze(one.model, one.loss, one.loader(), nf.SGD(0.1, 5, 0.1), one.symmetries, progress=False)
    assert all(math.isfinite(float(cell.replace(",", ""))) for cell in cells(known, report.name)[-4:])
    assert "not known:" not in str(known)


def test_an_error_that_was_not_measured_is_no_number() -> None:
    model, batches = with_a_dead_unit()
    sgd = nf.SGD(0.1, 8, 0.1)
    between = nf.analyze(model, squared_error, batches[:2], sgd, HIDDEN, microbatches=True, progress=False)
    single = nf.analyze(model, squared_error, batches, sgd, HIDDEN, progress=False)
    assert math.isnan(between.reports[0].error)
    assert cells(between, "hidden")[-2] == "-"
    assert "nan" not in str(between)
    assert float(cells(single, "hidden")[-2]) > 0
