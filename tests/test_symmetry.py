"""Axes unfold and fold; groups act as their generators say."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import noetherflow as nf
import oracles
from cases import Case, case, cases


@st.composite
def axes_and_tensors(draw: st.DrawFn) -> tuple[nf.Axis, Tensor]:
    repeat = draw(st.integers(1, 3))
    rows, before, after = draw(st.integers(1, 4)), draw(st.integers(0, 3)), draw(st.integers(0, 3))
    shape = draw(st.lists(st.integers(1, 4), min_size=0, max_size=3))
    dim = draw(st.integers(0, len(shape)))
    shape.insert(dim, before + rows * repeat + after)
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    if draw(st.booleans()):
        dim -= len(shape)
    return nf.Axis("t", dim, before, before + rows * repeat, repeat), tensor


@settings(deadline=None)
@given(axes_and_tensors())
def test_an_axis_unfolds_into_the_rows_that_its_definition_names(drawn: tuple[nf.Axis, Tensor]) -> None:
    axis, tensor = drawn
    rows = axis.rows(tensor)
    assert rows.shape[0] == axis.size(tensor)
    expected: list[set[float]] = [set() for _ in range(len(rows))]
    for position, row, _ in oracles._entries(axis, tensor):
        expected[row].add(float(position))
    assert [set(row.tolist()) for row in rows] == expected


@settings(deadline=None)
@given(axes_and_tensors())
def test_folding_undoes_unfolding_and_leaves_the_rest_alone(drawn: tuple[nf.Axis, Tensor]) -> None:
    axis, tensor = drawn
    rows = axis.rows(tensor)
    assert torch.equal(axis.replace(tensor, rows), tensor)
    marked = axis.replace(tensor, torch.full_like(rows, -1.0))
    touched = {position for position, _, _ in oracles._entries(axis, tensor)}
    flat = marked.reshape(-1).tolist()
    assert all((value == -1.0) == (position in touched) for position, value in enumerate(flat))
    assert torch.equal(axis.embed(rows, tensor), torch.where(marked == -1.0, tensor, 0.0))


@settings(deadline=None)
@given(axes_and_tensors(), st.integers(1, 3))
def test_a_leading_batch_dimension_is_left_alone(drawn: tuple[nf.Axis, Tensor], count: int) -> None:
    axis, tensor = drawn
    stack = torch.stack([tensor + 100 * k for k in range(count)])
    assert torch.equal(axis.rows(stack, batch_dims=1), torch.stack([axis.rows(one) for one in stack]))


@pytest.mark.parametrize("one", cases(), ids=str)
def test_groups_act_as_their_generators_say(one: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    for symmetry in one.symmetries.values():
        symmetry = symmetry.rename({name: oracles.canonical(one.model, name) for name in symmetry.names})
        basis = oracles.coordinates(symmetry, one.params)
        x = sum(0.3 * torch.randn((), generator=generator, dtype=torch.float64) * b for b in basis)
        q, theta = oracles.generator(symmetry, one.model, x), oracles.flat(one.params)
        torch.testing.assert_close(oracles.flat(symmetry.generate(x, one.params)), q @ theta)
        torch.testing.assert_close(oracles.flat(symmetry.act(x, one.params)), torch.linalg.matrix_exp(q) @ theta)
        assert symmetry.dimension(one.params) == len(basis)


@pytest.mark.parametrize("one", cases(), ids=str)
def test_the_charge_is_the_quadratic_form_of_the_generator(one: Case) -> None:
    theta = oracles.flat(one.params)
    for symmetry in one.symmetries.values():
        symmetry = symmetry.rename({name: oracles.canonical(one.model, name) for name in symmetry.names})
        charge = symmetry.charge(one.params)
        for x in oracles.coordinates(symmetry, one.params):
            expected = theta @ oracles.generator(symmetry, one.model, x) @ theta
            torch.testing.assert_close(oracles.pairing(charge, x), expected)


@pytest.mark.parametrize("one", cases(), ids=str)
def test_acting_passes_other_tensors_on_and_changes_nothing_in_place(one: Case) -> None:
    for symmetry in one.symmetries.values():
        symmetry = symmetry.rename({name: oracles.canonical(one.model, name) for name in symmetry.names})
        params = one.params | {"other": torch.ones(2)}
        before = {name: tensor.clone() for name, tensor in params.items()}
        x = symmetry.identity(params) + 0.1
        moved = symmetry.act(x, params)
        assert moved["other"] is params["other"]
        assert all(torch.equal(params[name], before[name]) for name in params)
        assert any(not torch.equal(moved[name], before[name]) for name in symmetry.names)


@pytest.mark.parametrize("one", cases(), ids=str)
def test_grams_of_a_stack_are_the_sums_over_its_examples(one: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    for symmetry in one.symmetries.values():
        symmetry = symmetry.rename({name: oracles.canonical(one.model, name) for name in symmetry.names})
        stack = {n: torch.randn(5, *t.shape, generator=generator, dtype=torch.float64) for n, t in one.params.items()}
        single = [symmetry.grams({name: tensor[k] for name, tensor in stack.items()}) for k in range(5)]
        for side, sides in zip(symmetry.grams(stack, batched=True), zip(*single, strict=True), strict=True):
            torch.testing.assert_close(side, torch.stack(sides).sum(0))
        halves = symmetry.example_charges(stack)
        for k, grams in enumerate(single):
            net = symmetry.charge_of(grams)
            net = net.diagonal() if net.ndim == 2 else net
            torch.testing.assert_close((halves.plus - halves.minus)[k], net)


def test_a_matrix_coordinate_that_is_not_symmetric_is_refused() -> None:
    one = case("matrix")
    with pytest.raises(nf.ParameterShapeError, match="symmetric"):
        one.symmetries["rotation"].act(torch.triu(torch.ones(3, 3)), one.params)


@pytest.mark.parametrize(
    "generator",
    [
        torch.tensor([[0.0, 1.0], [-1.0, 0.0]]),
        torch.tensor([[1.0, 1.0], [0.0, 1.0]]),
        torch.zeros(2, 2),
        torch.tensor([[float("nan"), 0.0], [0.0, 1.0]]),
        torch.ones(2, 3),
        torch.ones(2),
    ],
)
def test_a_generator_that_is_not_symmetric_is_refused(generator: Tensor) -> None:
    with pytest.raises(nf.ParameterShapeError, match="generator"):
        nf.DenseSymmetry(generator, names=("w",))


def test_dense_generators_are_equal_by_value() -> None:
    q = torch.diag(torch.tensor([1.0, -1.0]))
    assert nf.DenseSymmetry(q, "w") == nf.DenseSymmetry(q.clone(), "w")
    assert nf.DenseSymmetry(q, "w") != nf.DenseSymmetry(2 * q, "w")
    assert nf.DenseSymmetry(q, "w") != nf.DenseSymmetry(q, "u")
    assert len({nf.DenseSymmetry(q, "w"), nf.DenseSymmetry(q.clone(), "w")}) == 1


def test_a_dense_generator_reports_its_distinct_eigenvalues() -> None:
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    values = torch.tensor([2.0, 2.0, 1.0, 0.0, -1.0, -1.0]).double()
    symmetry = nf.DenseSymmetry((q * values) @ q.mT, "w")
    torch.testing.assert_close(symmetry.eigenvalues.plus.sort().values, torch.tensor([1.0, 2.0]).double())
    torch.testing.assert_close(symmetry.eigenvalues.minus, torch.tensor([-1.0]).double())


@pytest.mark.parametrize(
    ("axis", "words"),
    [
        (nf.Axis("w", 2), "dim must lie"),
        (nf.Axis("w", 0, start=1, stop=9), "does not fit"),
        (nf.Axis("w", 0, start=2, stop=1), "does not fit"),
        (nf.Axis("w", 0, repeat=3), "repeat=3"),
    ],
)
def test_an_axis_that_is_not_there_says_what_is(axis: nf.Axis, words: str) -> None:
    with pytest.raises(nf.ParameterShapeError, match=words) as raised:
        nf.DiagonalSymmetry(plus=axis).charge({"w": torch.ones(4, 3)})
    assert "(4, 3)" in str(raised.value)


def test_sides_of_different_sizes_are_listed() -> None:
    symmetry = nf.DiagonalSymmetry(plus=nf.Axis("w", 0), minus=nf.Axis("u", 1))
    with pytest.raises(nf.ParameterShapeError, match=r"has 4.*has 2"):
        symmetry.charge({"w": torch.ones(4, 3), "u": torch.ones(3, 2)})


def test_a_missing_name_is_listed_with_those_that_are_there() -> None:
    with pytest.raises(nf.ParameterNameError, match=r"'weigth'.*weight"):
        nf.ScalarSymmetry(plus=nf.Axis("weigth", 0)).charge({"weight": torch.ones(2)})


def test_a_symmetry_without_axes_is_refused() -> None:
    for kind, empty in itertools.product((nf.ScalarSymmetry, nf.DiagonalSymmetry, nf.MatrixSymmetry), ((), [])):
        with pytest.raises(nf.ParameterShapeError, match="at least one Axis"):
            kind(plus=empty)


@pytest.mark.parametrize("kind", [nf.ScalarSymmetry, nf.DiagonalSymmetry, nf.MatrixSymmetry])
def test_a_symmetry_may_have_nothing_but_a_minus_side(kind: type[nf.AxisSymmetry]) -> None:
    generator = torch.Generator().manual_seed(0)
    v = {"w": torch.randn(3, 2, generator=generator, dtype=torch.float64)}
    stack = {"w": torch.randn(5, 3, 2, generator=generator, dtype=torch.float64)}
    shrinking, growing = kind((), [nf.Axis("w", 0)]), kind([nf.Axis("w", 0)])
    x = growing.identity(v) + (torch.eye(3).double() if kind is nf.MatrixSymmetry else 0.3)
    assert shrinking.names == ("w",)
    assert shrinking.dimension(v) == growing.dimension(v)
    torch.testing.assert_close(shrinking.charge(v), -growing.charge(v))
    torch.testing.assert_close(shrinking.act(x, v), growing.act(-x, v))
    torch.testing.assert_close(shrinking.generate(x, v), growing.generate(-x, v))
    for mine, theirs in (
        (shrinking.grams(stack, batched=True), growing.grams(stack, batched=True)),
        (shrinking.example_charges(stack), growing.example_charges(stack)),
    ):
        torch.testing.assert_close(mine.minus, theirs.plus)
        torch.testing.assert_close(mine.plus, torch.zeros_like(theirs.plus))


def test_an_axis_of_one_matrix_of_a_stack() -> None:
    """`within`: everything outside that part stays, and the rows are those of the part alone."""
    tensor = torch.randn(2, 6, 4, dtype=torch.float64)
    axis = nf.Axis("w", 2, within=(1, 2, 4))
    assert axis.size(tensor) == 4
    assert torch.equal(axis.rows(tensor), tensor[:, 2:4].movedim(2, 0).reshape(4, -1))
    x = torch.randn(4, dtype=torch.float64)
    expected = tensor.clone()
    expected[:, 2:4] *= torch.exp(x)
    torch.testing.assert_close(nf.DiagonalSymmetry(axis).act(x, {"w": tensor})["w"], expected)
    batched = torch.stack([tensor, 2 * tensor])
    assert torch.equal(axis.rows(batched, batch_dims=1)[1], axis.rows(2 * tensor))
    with pytest.raises(nf.ParameterShapeError, match="within"):
        nf.Axis("w", 2, within=(2, 0, 1)).size(tensor)
