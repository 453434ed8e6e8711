"""The page on when a move helps: its tables are the stored measurements, its sentences hold, its tools work."""

import copy
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import noetherflow as nf

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from moving import experiments, show, subjects

ROOT = Path(__file__).parents[1]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "when_it_helps.json").read_text("utf-8"))
ROWS = {name: part["rows"] for name, part in RESULTS.items()}


def tables_of_page(page: str) -> dict[str, str]:
    return {place["name"]: place["table"].strip() for place in show.PLACE.finditer(page)}


def test_the_tables_of_the_page_are_those_of_the_measurements() -> None:
    page = show.PAGE.read_text("utf-8")
    assert tables_of_page(page) == show.tables_of(RESULTS)
    changed = copy.deepcopy(RESULTS)
    changed["at_once"]["rows"][0]["sharpness"][1] *= 2
    assert tables_of_page(page) != show.tables_of(changed)


def small(curvature: float = 1.0) -> subjects.Subject:
    """The loss c w^2 x^2 / 2 at x = 1, of a single weight w = 3."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(model.weight, 3.0)
    data = TensorDataset(torch.ones(30, 1, dtype=torch.float64))

    def loss(model: nn.Module, batch: tuple[torch.Tensor]) -> torch.Tensor:
        return curvature / 2 * model(batch[0]).square().sum(1)

    return subjects.Subject("small", model, loss, data, data, nf.SGD(lr=0.1, batch_size=5), 1e-3)


def test_sharpness_is_the_largest_eigenvalue_of_the_hessian() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x, y = torch.randn(20, 2).double(), torch.randn(20, 1).double()

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (model(batch[0]) - batch[1]).square().sum(1)

    data = TensorDataset(x, y)
    subject = subjects.Subject("tanh", model, loss, data, data, nf.SGD(0.1, 5), 1e-3)
    names, shapes = zip(*((name, p.shape) for name, p in model.named_parameters()), strict=True)
    sizes = [shape.numel() for shape in shapes]

    def mean_loss(flat: torch.Tensor) -> torch.Tensor:
        parts = (part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True))
        prediction = torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (x,))
        return (prediction - y).square().sum(1).mean()

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    eigenvalues = torch.linalg.eigvalsh(torch.autograd.functional.hessian(mean_loss, flat))
    assert experiments.sharpness(subject, model) == pytest.approx(float(eigenvalues[-1]), rel=1e-3)
    assert float(eigenvalues[-2]) < 0.9 * float(eigenvalues[-1])


@pytest.mark.parametrize(("curvature", "expected"), [(8.0, 0.0125 * 2 ** (17 / 4)), (30.0, 0.0125 * 2 ** (9 / 4))])
def test_the_largest_stable_rate_of_a_parabola_is_two_over_its_curvature(curvature: float, expected: float) -> None:
    """On the grid of factors 2^(1/4): the largest lr below 2 / curvature."""
    assert expected < 2 / curvature < expected * 2**0.25
    subject = small(curvature)
    assert experiments.largest_rate(subject, subject.model) == pytest.approx(expected, rel=1e-12)


def adamw_jumps(row: dict[str, Any], way: str) -> list[float]:
    """By how much the losses are above those without the move; the first is that of the moved model."""
    return [moved - stayed for moved, stayed in zip(row[way], row["stays"], strict=True)]


def has_no_jump(row: dict[str, Any], way: str) -> bool:
    """No loss of the 20 steps is above that without the move by a tenth of the median change from batch to batch."""
    changes = [abs(a - b) for a, b in zip(row["stays"], row["stays"][1:], strict=False)]
    jumps = adamw_jumps(row, way)
    return abs(jumps[0]) < 1e-9 and max(jumps) < 0.1 * statistics.median(changes)


def test_adamw_continues_without_a_jump_and_with_a_fresh_state_it_does_not() -> None:
    assert len(ROWS["adamw"]) == 3
    for row in ROWS["adamw"]:
        assert len(row["stays"]) == 20
        assert has_no_jump(row, "moves, transport")
        assert not has_no_jump(row, "moves, reset")


@pytest.mark.slow
def test_adamw_on_gpt2_gives_the_stored_losses() -> None:
    row = experiments.adamw(0)
    assert has_no_jump(row, "moves, transport")
    assert not has_no_jump(row, "moves, reset")
    for way, losses in row.items():
        assert losses == pytest.approx(ROWS["adamw"][0][way], rel=0.01)


def test_the_measurements_of_a_model_are_the_stored_ones() -> None:
    subject = subjects.mlp(0)
    (stored,) = [row for row in ROWS["at_once"] if (row["model"], row["seed"]) == ("digits MLP", 0)]
    equilibrium = subject.equilibrium()
    assert [equilibrium.trace_before, equilibrium.trace_after] == pytest.approx(stored["trace"], rel=0.01)
    assert experiments.sharpness(subject, subject.model) == pytest.approx(stored["sharpness"][0], rel=0.01)


def every(rows: list[dict[str, Any]], **values: Any) -> list[dict[str, Any]]:
    """The rows with certain values, which are there."""
    chosen = [row for row in rows if all(row[key] == value for key, value in values.items())]
    assert chosen
    return chosen


def claims(rows: dict[str, list[dict[str, Any]]]) -> dict[str, bool]:
    """The sentences of the page, and whether they hold for measurements."""
    course, adapters = rows["course"], [row for row in rows["adapters"] if row["steps"] > 0]
    late = {decay: every(course, steps=37000, **{"weight decay": decay}) for decay in (0.0, 1e-4, 1e-3)}
    means = {
        (model, key): statistics.fmean(show.ratio(row, key) for row in every(rows["at_once"], model=model))
        for model in subjects.MAKERS
        for key in ("trace", "sharpness", "largest lr")
    }
    lora = {kind: [row[f"{kind}, moves"] > row[f"{kind}, stays"] for row in adapters] for kind in ("SGD", "AdamW")}
    unused = [row["imbalance, unused"] for row in rows["at_once"]]
    return {
        "the sharpness falls on average": all(means[model, "sharpness"] < 1 for model in subjects.MAKERS),
        "a larger learning rate becomes stable on average": all(
            means[model, "largest lr"] > 1 for model in subjects.MAKERS
        ),
        "but not in every run": any(show.ratio(row, "largest lr") <= 1 for row in rows["at_once"]),
        "the CNN has a higher loss after 200 steps": all(
            show.gap(row, "200") > 0 for row in every(rows["continuation"], model="digits CNN")
        ),
        "LoRA with SGD is slower in every run": all(lora["SGD"]),
        "LoRA with AdamW is slower in all but one run": lora["AdamW"].count(False) == 1,
        "LoRA has no equilibrium at the start": all(
            row["status"] == "degenerate" for row in every(rows["adapters"], steps=0)
        ),
        "on unused data most of the imbalance is gone": all(after < before / 2 for before, after in unused),
        "but not all of it": all(after > 0.01 for _, after in unused),
        "nothing is at rest": all(row["at rest"] == 0 for row in [*rows["at_once"], *course]),
        "everything converges": all(row["converged"] == row["symmetries"] for row in rows["at_once"]),
        "SGD does not arrive without decay": all(row["imbalance"] > 0.3 for row in late[0.0]),
        "SGD arrives with decay": all(row["imbalance"] < 0.02 for row in late[1e-3]),
        "it takes 1 / (2 lr decay) steps": all(
            row["median steps"] == pytest.approx(1 / (2 * 0.05 * decay), rel=0.01)
            for decay in (1e-4, 1e-3)
            for row in late[decay]
        ),
        "with less decay a part is removed": all(0.1 < row["imbalance"] < 0.2 for row in late[1e-4]),
        "Tr Sigma is smaller without decay": all(
            show.ratio(row, "trace") < 1 for row in every(rows["decays"], **{"weight decay": 0.0})
        ),
        "Tr Sigma can be larger with decay": all(
            show.ratio(row, "trace") > 1 for row in every(rows["decays"], model="digits MLP", **{"weight decay": 0.01})
        ),
    }


def test_the_sentences_of_the_page_hold() -> None:
    failed = [sentence for sentence, holds in claims(ROWS).items() if not holds]
    assert not failed


def test_sentences_that_do_not_hold_are_noticed() -> None:
    """With every pair and every comparison the other way round, most sentences fail."""

    def other(key: str) -> str:
        return key.replace("moves", "stays") if "moves" in key else key.replace("stays", "moves")

    def reversed_(row: dict[str, Any]) -> dict[str, Any]:
        pairs = {key: value[::-1] for key, value in row.items() if isinstance(value, list) and len(value) == 2}
        return row | pairs | {key: row[other(key)] for key in row if other(key) != key}

    others = {name: rows if name == "adamw" else [reversed_(row) for row in rows] for name, rows in ROWS.items()}
    failed = {sentence for sentence, holds in claims(others).items() if not holds}
    assert failed >= {
        "the sharpness falls on average",
        "a larger learning rate becomes stable on average",
        "the CNN has a higher loss after 200 steps",
        "LoRA with SGD is slower in every run",
        "on unused data most of the imbalance is gone",
        "Tr Sigma is smaller without decay",
    }
