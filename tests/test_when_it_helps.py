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

Rows = list[dict[str, Any]]
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


def every(rows: Rows, **values: Any) -> Rows:
    """The rows with certain values, which are there."""
    chosen = [row for row in rows if all(row[key] == value for key, value in values.items())]
    assert chosen
    return chosen


def claims(rows: dict[str, Rows]) -> dict[str, bool]:
    """The sentences of the page, and whether they hold for measurements."""
    parts = (of_the_move, of_training, of_adapters, of_the_course, of_decays)
    return {sentence: holds for part in parts for sentence, holds in part(rows).items()}


def of_the_move(rows: dict[str, Rows]) -> dict[str, bool]:
    at_once = rows["at_once"]
    falls = sorted(round(100 - 100 * show.ratio(row, "sharpness")) for row in at_once)
    rates = {
        model: statistics.fmean(show.ratio(row, "largest lr") for row in every(at_once, model=model))
        for model in subjects.MAKERS
    }
    lower = [row["model"] for row in at_once if show.ratio(row, "largest lr") < 1]
    unused = [row["imbalance, unused"] for row in at_once]
    return {
        "the sharpness falls in every run, by 3 to 54 %": (falls[0], falls[-1]) == (3, 54),
        "a larger learning rate is stable on average": min(rates.values()) > 1,
        "by a step of the grid or more in the CNN only": [m for m in rates if rates[m] > 2**0.25] == ["digits CNN"],
        "the largest rate falls in two runs of the MLP": lower == ["digits MLP", "digits MLP"],
        "all symmetries converge": all(row["converged"] == row["symmetries"] for row in at_once),
        "on unused data most of the imbalance is gone": all(after < before / 2 for before, after in unused),
        "but not all of it": all(after > 0.01 for _, after in unused),
        "none is at rest before the move": not any(row["at rest"] for row in [*at_once, *rows["course"]]),
    }


def of_training(rows: dict[str, Rows]) -> dict[str, bool]:
    further = show.groups(rows["continuation"], "model", "optimizer")
    gaps = {key: [show.gap(row, "200") / row["stays, 200"] for row in group] for key, group in further.items()}
    mlp, cnn, gpt2 = ({kind: gaps[model, kind] for kind in subjects.OPTIMIZERS} for model in subjects.MAKERS)
    unused = [show.gap(row, "unused") for row in every(rows["continuation"], model="digits CNN")]
    unstable = [(row["model"], row["optimizer"]) for row in rows["continuation"] if row["stays, 200"] > 1]
    return {
        "MLP: lower on average, by 3 % at most": all(-0.03 < statistics.fmean(gap) < 0 for gap in mlp.values()),
        "MLP: in every run with AdamW only": [kind for kind in mlp if max(mlp[kind]) < 0] == ["AdamW"],
        "CNN: higher in every run": all(min(gap) > 0 for gap in cnn.values()),
        "CNN: by 5 to 11 % on average": all(0.05 < statistics.fmean(gap) < 0.11 for gap in cnn.values()),
        "CNN: higher on unused data on average": statistics.fmean(unused) > 0,
        "GPT-2: lower with SGD and momentum": max(*gpt2["SGD"], *gpt2["SGD with momentum"]) < 0,
        "GPT-2: with momentum by less than 1 %": min(gpt2["SGD with momentum"]) > -0.01,
        "GPT-2: one run with AdamW is higher": sum(gap > 0 for gap in gpt2["AdamW"]) == 1,
        "one run without the move is unstable": unstable == [("GPT-2", "SGD")],
        "none with the move is": not any(row["moves, 200"] > 0.5 for row in rows["continuation"]),
    }


def of_adapters(rows: dict[str, Rows]) -> dict[str, bool]:
    later = [row for row in rows["adapters"] if row["steps"] > 0]
    slower = {kind: [row[f"{kind}, moves"] > row[f"{kind}, stays"] for row in later] for kind in ("SGD", "AdamW")}
    first = [row["status"] for row in every(rows["adapters"], steps=0)]
    return {
        "LoRA has no equilibrium at the start": set(first) == {"degenerate"},
        "a few steps later it has": {row["status"] for row in later} == {"converged"},
        "LoRA with SGD is slower in every run": all(slower["SGD"]),
        "LoRA with AdamW is slower in all but one run": slower["AdamW"].count(False) == 1,
    }


def of_the_course(rows: dict[str, Rows]) -> dict[str, bool]:
    late = {decay: every(rows["course"], steps=37000, **{"weight decay": decay}) for decay in (0.0, 1e-4, 1e-3)}
    times = {decay: [row["median steps"] for row in group] for decay, group in late.items()}
    return {
        "SGD does not arrive without decay": all(row["imbalance"] > 0.3 for row in late[0.0]),
        "SGD arrives with decay 0.001": all(row["imbalance"] < 0.02 for row in late[1e-3]),
        "with 0.0001 it removes a part": all(0.1 < row["imbalance"] < 0.2 for row in late[1e-4]),
        "decay 0.001 takes 10,000 steps": times[1e-3] == pytest.approx([1e4] * 3, rel=0.01),
        "decay 0.0001 takes 100,000 steps": times[1e-4] == pytest.approx([1e5] * 3, rel=0.01),
        "without decay more than a billion": min(times[0.0]) > 1e9,
    }


def of_decays(rows: dict[str, Rows]) -> dict[str, bool]:
    still = every(rows["decays"], **{"weight decay": 0.0})
    strong = [row for row in every(rows["decays"], model="digits MLP") if row["weight decay"] >= 1e-3]
    norms = show.groups(still, "model").values()
    return {
        "Tr Sigma is smaller without decay": all(show.ratio(row, "trace") < 1 for row in still),
        "the squared weights double or more": all(
            statistics.fmean(show.ratio(row, "norm") for row in group) > 1.9 for group in norms
        ),
        "the MLP is singular": all(row["status"] == "singular" for row in every(still, model="digits MLP")),
        "Tr Sigma of the MLP is larger with decay": all(show.ratio(row, "trace") > 1 for row in strong),
        "Tr Sigma of GPT-2 falls": all(show.ratio(row, "trace") < 1 for row in every(rows["decays"], model="GPT-2")),
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
        "the sharpness falls in every run, by 3 to 54 %",
        "a larger learning rate is stable on average",
        "on unused data most of the imbalance is gone",
        "MLP: in every run with AdamW only",
        "CNN: higher in every run",
        "LoRA with SGD is slower in every run",
        "Tr Sigma is smaller without decay",
        "Tr Sigma of the MLP is larger with decay",
    }
