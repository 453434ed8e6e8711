"""What results print: every cell is a number that the test computes from gradients of single examples."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import checks
import noetherflow as nf
import oracles
import stored
from cases import Case, case, cases
from html_cells import cells_of

LR, SIZE, DECAY = 0.1, 5, 0.02
SGD = nf.SGD(LR, SIZE, DECAY)


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def analysis_of(one: Case) -> nf.Analysis:
    """In one batch, so that errors are taken about the mean gradient itself."""
    return nf.analyze(one.model, one.loss, [one.batch], SGD, one.symmetries, progress=False)


def rows_of(text: str, heading: str, count: int | None = None) -> dict[str, list[str]]:
    """The last cells of the rows under the headings that begin so, by the first cell; until the next empty line."""
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(heading))
    count = count or len(lines[start].split()) - 1
    rows = {}
    for line in lines[start + 2 :]:
        if not line or line.startswith("*"):
            break
        name, *cells = line.rsplit(maxsplit=count)
        rows[name] = cells
    return rows


def along_rows(symmetry: nf.Symmetry, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Squares of tensors on the plus and on the minus side, with the weight of the charge, row by row."""
    if isinstance(symmetry, nf.DenseSymmetry):
        squares = torch.cat([tensors[name].reshape(-1) for name in symmetry.names]).square()
        weights = symmetry.generator.diagonal()
        assert torch.equal(weights.diag(), symmetry.generator)
        return (squares * weights.clamp_min(0)).sum()[None], (squares * -weights.clamp_max(0)).sum()[None]
    sides = []
    for axes in (symmetry.plus, symmetry.minus):
        rows = [axis.rows(tensors[axis.name]).square().sum(1) for axis in axes] or [torch.zeros(1).double()]
        sides.append(
            torch.stack(rows).sum(0) if not isinstance(symmetry, nf.ScalarSymmetry) else sum(map(sum, rows))[None]
        )
    return sides[0], sides[1]


def expected_noise(one: Case, symmetry: nf.Symmetry) -> tuple[Tensor, Tensor, Tensor]:
    """N+ and N- by row, and the standard error of their difference by row."""
    gradients = oracles.gradients(one.model, one.loss, one.batch)
    mean = {name: torch.stack([g[name] for g in gradients]).mean(0) for name in gradients[0]}
    sides = [along_rows(symmetry, {name: g[name] - mean[name] for name in g}) for g in gradients]
    plus, minus = (torch.stack(side) for side in zip(*sides, strict=True))
    error = (plus - minus).std(0) / math.sqrt(len(gradients))
    return plus.mean(0), minus.mean(0), error


def canonical(one: Case, symmetry: nf.Symmetry) -> nf.Symmetry:
    named = dict(one.model.named_parameters(remove_duplicate=False))
    return symmetry.rename({name: oracles.canonical(one.model, name) for name in named})


def rms(values: Tensor) -> float:
    return math.sqrt(sum(float(value) ** 2 for value in values.reshape(-1)) / len(values.reshape(-1)))


def test_every_cell_of_moments_is_computed_again() -> None:
    for one in cases():
        noise = nf.estimate_noise(one.model, one.loss, [one.batch], one.symmetries, progress=False)
        text = str(noise)
        assert text.startswith(f"Gradient noise ({len(one.batch[0])} examples)")
        rows = rows_of(text, "symmetry")
        assert list(rows) == list(one.symmetries)
        for name, symmetry in noise.symmetries.items():
            plus, minus, error = expected_noise(one, symmetry)
            size = float(error.square().sum().sqrt())
            net = float(plus.sum() - minus.sum())
            assert rows[name] == [f"{plus.sum():.3g}", f"{minus.sum():.3g}", f"{net:+.3g}", f"{size:.1e}"]
        _, sigma = oracles.covariance(one.model, one.loss, one.batch)
        assert rows_of(text, "total", 1)["gradient noise, Tr Sigma"] == [f"{sigma.trace():.6g}"]


def test_moments_with_sides_exchanged_print_something_else() -> None:
    one = case("diagonal")
    noise = nf.estimate_noise(one.model, one.loss, [one.batch], one.symmetries, progress=False)
    exchanged = {name: nf.Grams(sides.minus, sides.plus) for name, sides in noise.scatter.items()}
    rows = (rows_of(str(each), "symmetry")["hidden"] for each in (noise, dataclasses.replace(noise, scatter=exchanged)))
    (plus, minus, net, _), (other_plus, other_minus, other_net, _) = rows
    assert (plus, minus) == (other_minus, other_plus)
    assert plus != minus
    assert net[0] != other_net[0]


def expected_charge(one: Case, symmetry: nf.Symmetry) -> Tensor:
    plus, minus = along_rows(symmetry, one.params)
    return plus - minus


@pytest.mark.parametrize("one", [one for one in cases() if "matri" not in one.name], ids=str)
def test_every_cell_of_an_analysis_is_computed_again(one: Case) -> None:
    analysis = analysis_of(one)
    text = str(analysis)
    rows = rows_of(text, "symmetry")
    # Below the rows are notes.
    assert list(rows)[: len(one.symmetries)] == list(one.symmetries)
    assert next(iter([*rows][len(one.symmetries) :])).startswith("Distances and steps are")
    for report in analysis.reports:
        symmetry = canonical(one, one.symmetries[report.name])
        plus, minus, error = expected_noise(one, symmetry)
        charge = expected_charge(one, symmetry)
        rate = LR / SIZE * (plus - minus) - 2 * DECAY * charge
        x = analysis.equilibrium.coordinates[report.name]
        times = sorted(float(time) for time in analysis.equilibrium.relaxation_steps[report.name].reshape(-1))
        median = times[(len(times) - 1) // 2]
        assert rows[report.name] == [
            str(len(checks.along(symmetry, one.model))),
            f"{report.residual:.0e}",
            f"{charge.sum():+.3g}",
            f"{plus.sum():.3g}",
            f"{minus.sum():.3g}",
            f"{LR * rms(rate):.1e}",
            f"{rms(x):.3f}",
            f"{rms(analysis.equilibrium.standard_error[report.name]):.3f}",
            f"{median:,.0f}" if median < 1e7 else f"{median:.1e}",
        ]
        # Rounding, as far as the proof of a symmetry by itself says; random transformations differ.
        assert 0 <= report.residual < 1e-13
        assert nf.verify_symmetry(one.model, one.loss, one.batch, symmetry) < 1e-13
        assert report.noise_error == pytest.approx(float(error.square().sum().sqrt()))
        assert report.noise_plus - report.noise_minus == pytest.approx(float((plus - minus).sum()))
        assert report.slowest_steps == times[-1]
        assert report.kind + "symmetry" == type(symmetry).__name__.lower()


def test_the_distance_is_that_between_the_parameters() -> None:
    """Rows of the incoming weights grow by e^x on the way to the equilibrium, and x is far from zero here."""
    one = case("diagonal")
    analysis = analysis_of(one)
    after, before = (params["0.weight"].norm(dim=1) for params in (analysis.equilibrium.params, one.params))
    expected = rms((after / before).log())
    assert expected > 0.1
    assert analysis.reports[0].distance == pytest.approx(expected, rel=1e-9)
    assert rows_of(str(analysis), "symmetry")["hidden"][6] == f"{expected:.3f}"
    assert rows_of(str(analysis.equilibrium), "symmetry")["hidden"][1] == f"{expected:.3f}"


def test_a_matrix_is_reported_by_trace_and_frobenius_norm() -> None:
    one = case("matrix")
    analysis = analysis_of(one)
    symmetry = one.symmetries["rotation"]
    plus, minus, _ = expected_noise(one, symmetry)
    size, _, charge, noise_plus, noise_minus, drift, distance, shown, _ = rows_of(str(analysis), "symmetry")["rotation"]
    assert (size, charge) == ("6", f"{expected_charge(one, symmetry).sum():+.3g}")  # n (n + 1) / 2 for n = 3
    assert (noise_plus, noise_minus) == (f"{plus.sum():.3g}", f"{minus.sum():.3g}")
    rate = nf.drift(analysis.noise, SGD, one.model)["rotation"]
    assert drift == f"{LR * math.sqrt(sum(float(v) ** 2 for v in rate.reshape(-1)) / 3):.1e}"
    x = torch.linalg.eigvalsh(analysis.equilibrium.coordinates["rotation"])
    assert distance == f"{rms(x):.3f}"
    error = analysis.equilibrium.standard_error["rotation"]
    assert shown == f"{math.sqrt(sum(float(v) ** 2 for v in error.reshape(-1)) / 3):.3f}"


def test_planted_faults_in_a_report_change_the_table() -> None:
    analysis = analysis_of(case("diagonal, coupled layers"))
    good = rows_of(str(analysis), "symmetry")
    first = analysis.reports[0]
    faults: list[dict[str, Any]] = [
        {"noise_plus": first.noise_minus, "noise_minus": first.noise_plus},
        {"distance": 0.0},
        {"relaxation_steps": first.slowest_steps},
        {"charge": -first.charge},
        {"drift": 2 * first.drift},
        {"dimension": first.dimension + 1},
    ]
    for fault in faults:
        reports = (dataclasses.replace(first, **fault), *analysis.reports[1:])
        assert rows_of(str(dataclasses.replace(analysis, reports=reports)), "symmetry") != good, fault
    for report in analysis.reports:
        assert report.relaxation_steps < report.slowest_steps  # median and slowest can be told apart


@pytest.mark.parametrize("name", ["diagonal, coupled layers", "dense, eigenvalues 1 and -2", "matrix"])
def test_every_cell_of_an_equilibrium_is_computed_again(name: str) -> None:
    one = case(name)
    analysis = analysis_of(one)
    equilibrium = analysis.equilibrium
    text = str(equilibrium)
    for symmetry, cells in rows_of(text, "symmetry").items():
        times = sorted(float(time) for time in equilibrium.relaxation_steps[symmetry].reshape(-1))
        x = equilibrium.coordinates[symmetry]
        x = torch.linalg.eigvalsh(x) if x.ndim == 2 else x
        wanted = [f"{t:,.0f}" if t < 1e7 else f"{t:.1e}" for t in (times[(len(times) - 1) // 2], times[-1])]
        error = equilibrium.standard_error[symmetry]
        rows = len(error) if error.ndim else 1
        assert cells == ["converged", f"{rms(x):.3f}", f"{(error.square().sum() / rows).sqrt():.3f}", *wanted]
    moved = copy.deepcopy(one.model)
    moved.load_state_dict(equilibrium.params)
    pairs = {}
    for what, model in (("now", one.model), ("then", moved)):
        _, sigma = oracles.covariance(model, one.loss, one.batch)
        decay = DECAY * sum(float(p.detach().square().sum()) for p in model.parameters())
        pairs[what] = float(sigma.trace()), decay + LR / (2 * SIZE) * float(sigma.trace())
    for shown in (text, str(analysis)):
        rows = rows_of(shown, "total")
        assert len(rows) == 2
        for cells, now, then in zip(rows.values(), pairs["now"], pairs["then"], strict=True):
            assert [float(cell) for cell in cells] == pytest.approx([now, then, then / now], rel=1e-4)
        assert list(rows)[1].startswith("potential")
        assert pairs["now"][1] > pairs["then"][1]
    assert "All parameters (2 measurements)" in text
    solved = str(nf.solve_equilibrium(checks.noise_of(one), SGD, one.model))
    assert "All parameters (1 measurement)" in solved
    assert all(cells[2] == "-" for cells in rows_of(solved, "symmetry").values())
    assert f"All parameters ({len(one.batch[0])} examples, 2 measurements)" in str(analysis)


def test_what_did_not_end_well_is_starred_and_explained() -> None:
    one = case("diagonal")
    with torch.no_grad():
        one.model[0].weight[1] = 0.0
        one.model[0].bias[1] = -1.0
    analysis = nf.analyze(one.model, one.loss, one.loader(), nf.SGD(0.1, 5), one.symmetries, progress=False)
    assert math.isinf(analysis.equilibrium.relaxation_steps["hidden"][1])
    rows = rows_of(str(analysis.equilibrium), "symmetry")
    assert rows["hidden*"][0] == "singular"
    finite = sorted(t for t in analysis.equilibrium.relaxation_steps["hidden"].tolist() if math.isfinite(t))
    assert rows["hidden*"][3:] == [f"{t:,.0f}" if t < 1e7 else f"{t:.1e}" for t in (finite[1], finite[-1])]
    for text in (str(analysis), str(analysis.equilibrium)):
        assert "* hidden: rows 1 carry neither" in text
        assert max(map(len, text.splitlines())) <= 80


def test_a_coordinate_without_an_equilibrium_never_relaxes() -> None:
    analysis = analysis_of(case("diagonal"))
    times = {"hidden": torch.full((5,), math.inf, dtype=torch.float64)}
    nowhere = dataclasses.replace(analysis.equilibrium, relaxation_steps=times)
    assert rows_of(str(nowhere), "symmetry")["hidden"][3:] == ["never", "never"]


EXPLAINED = """\
Symmetries
symmetry  kind      plus        minus          resid  note
--------------------------------------------------------------
0 -> 3    diagonal  0.weight 0  3.weight 1 x4  2e-16  relu (1)
                    0.bias 0
0 -> 3    diagonal  0.weight 0  3.weight 1 x4    inf  REJECTED
                    0.bias 0
REJECTED: the operations of the model allow the symmetry, but the numbers do
not, so it is left out; resid says by how much.
* 0 -> 3: the gradient of a loss is NaN or infinite at the parameters of the
model, so that nothing is proved. Look for divisions by zero and for square
roots and logarithms of zero, and keep their arguments from zero (clamp, eps)

Axes on which no symmetry acts
parameter, axes   because of
----------------------------
0.weight 1, 2, 3  conv2d (0)
3.weight 0        sub
3.bias 0

Symmetries that do not act along axes
Only symmetries along axes were searched for. nf.discover_blocks,
nf.discover_rescalings and, up to 80 parameters, nf.discover_generators search
further.

     resid change of a loss or cosine with a gradient, the largest over examples
      note the operation (module) that prevents a matrix from mixing rows
because of the operation (module) that fixes the scale of the axes"""


def test_an_explanation_to_the_character() -> None:
    explanation = stored.explanation()
    assert explanation.found[0].residual < 1e-12
    found = dataclasses.replace(explanation.found[0], residual=nf.Residual(1e-16, 2e-16, 0))
    assert str(dataclasses.replace(explanation, found=(found,))) == EXPLAINED
    assert str(dataclasses.replace(explanation, rejected=())) != EXPLAINED
    # A finite residual in the losses blames a rule, alone and beside a candidate without a proof.
    wrong = dataclasses.replace(explanation.rejected[0], name="0 -> 4", residual=nf.Residual(0.5, 0.5, 7))
    for rejected in ((wrong,), (wrong, *explanation.rejected)):
        text = " ".join(str(dataclasses.replace(explanation, rejected=rejected)).split())
        assert "resid says by how much." in text
        assert "Otherwise: the rule of an operation is wrong; please report the model" in text
        assert ("* 0 -> 3: the gradient of a loss is NaN" in text) == (len(rejected) == 2)


def test_slices_and_stacks_are_written_out() -> None:
    symmetry = nf.MatrixSymmetry(nf.Axis("a", 0, start=2, stop=4), nf.Axis("b", 1, repeat=3, within=(0, 1, 2)))
    finding = nf.Finding("x", symmetry, nf.Residual(1e-16, 0.0, 0), small="norm adds 1e-05")
    shown = str(nf.Explanation((finding,), (), ()))
    assert "x         matrix  a 0[2:4]  b 1 x3 in 0[1:2]  1e-16  norm adds 1e-05" in shown


def test_pages_show_the_cells_of_the_text() -> None:
    analysis = analysis_of(case("diagonal, coupled layers"))
    for result in (analysis, analysis.noise, analysis.equilibrium, stored.explanation()):
        page = cells_of(result._repr_html_())
        squeezed = "".join(str(result).split())
        cells = [text for row in page.rows for text, _ in row]
        assert len(cells) > 12
        for cell in cells:
            for word in cell.split():
                assert word.replace("\n", "") in squeezed or len(page.rows[1]) == 6  # lines of an explanation's cells


def test_a_hostile_name_of_a_symmetry_stays_text() -> None:
    one = case("diagonal")
    name = "<img src=x onerror=alert(1)>\x1b[2J"
    analysis = nf.analyze(one.model, one.loss, one.loader(), SGD, {name: one.symmetries["hidden"]}, progress=False)
    for result in (analysis, analysis.noise, analysis.equilibrium):
        assert "\x1b" not in str(result) + result._repr_html_()
        assert "img" not in cells_of(result._repr_html_()).tags
        assert max(map(len, str(result).splitlines())) <= 80


def test_what_was_measured_example_by_example_is_counted() -> None:
    noise = dataclasses.replace(stored.noise(), fallback={"0.weight": "a", "0.bias": "b"})
    assert "* 2 parameters were measured example by example: see fallback" in str(noise)
    assert "fallback" not in str(stored.noise())
