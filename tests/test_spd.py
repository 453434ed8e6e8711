"""Geometric means and ranges of positive matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import checks
from noetherflow import _spd


@pytest.mark.parametrize("size", [1, 2, 3, 8, 24, 64])
@pytest.mark.parametrize("condition", [10.0, 1e4, 1e6])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_riccati_to_rounding(size: int, condition: float, seed: int) -> None:
    checks.riccati_solves(size, condition, seed)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 64), st.floats(0, 6), st.integers(0, 2**31))
def test_riccati_on_drawn_pairs(size: int, decades: float, seed: int) -> None:
    checks.riccati_solves(size, 10**decades, seed)


def test_the_last_newton_step_removes_rounding() -> None:
    """Residuals of the textbook formula, which has no such step, are several times as large on average."""

    def textbook(r: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        lower = torch.linalg.cholesky(r)
        values, vectors = torch.linalg.eigh(_spd.symmetric(lower.mT @ p @ lower))
        half = torch.linalg.solve_triangular(lower.mT, (vectors * values.sqrt()) @ vectors.mT, upper=True)
        return _spd.symmetric(torch.linalg.solve_triangular(lower.mT, half.mT, upper=True))

    residuals = []
    for seed in range(20):
        p, r = checks.spd_pair(24, 100.0, seed)
        solutions = _spd.riccati(r, p), textbook(r, p)
        residuals.append([torch.linalg.norm(x @ r @ x - p) / torch.linalg.norm(p) for x in solutions])
    found, plain = torch.tensor(residuals).mean(0)
    assert found < 0.5 * plain


def test_the_pairs_are_far_from_commuting() -> None:
    p, r = checks.spd_pair(24, 1e4, 0)
    assert torch.linalg.norm(p @ r - r @ p) > 0.1 * torch.linalg.norm(p @ r)


def test_the_arithmetic_mean_does_not_solve_it() -> None:
    p, r = checks.spd_pair(8, 100.0, 0)
    x = (torch.linalg.inv(r) + p) / 2
    assert torch.linalg.norm(x @ r @ x - p) > 0.5 * torch.linalg.norm(p)


def test_the_geometric_mean_of_numbers_is_their_own() -> None:
    p, r = torch.tensor([[5.0]]).double(), torch.tensor([[0.2]]).double()
    torch.testing.assert_close(_spd.riccati(r, p), torch.tensor([[5.0]]).double())


def test_exponential_and_logarithm_undo_each_other() -> None:
    p, _ = checks.spd_pair(6, 100.0, 3)
    torch.testing.assert_close(_spd.expm(_spd.logm(p)), p)
    torch.testing.assert_close(_spd.expm(p), torch.linalg.matrix_exp(p))


def basis(*columns: int, size: int = 5) -> torch.Tensor:
    return torch.eye(size, dtype=torch.float64)[:, list(columns)]


def test_ranges_of_two_singular_matrices_in_general_position() -> None:
    q = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    left = q @ torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0]).double()) @ q.mT
    right = q @ torch.diag(torch.tensor([4.0, 0.1, 0.0, 2.0, 0.0]).double()) @ q.mT
    found = _spd.ranges(left, right)
    for part, expected in zip(found, (q[:, :2], q[:, 2:3], q[:, 3:4], q[:, 4:]), strict=True):
        torch.testing.assert_close(part @ part.mT, expected @ expected.mT)


def test_ranges_of_two_positive_matrices_are_everything() -> None:
    found = _spd.ranges(*checks.spd_pair(5, 10.0, 0))
    assert [part.shape[1] for part in found] == [5, 0, 0, 0]


def test_ranges_do_not_depend_on_the_scale_of_either_matrix() -> None:
    left, right = (
        torch.diag(torch.tensor([1.0, 1.0, 0.0]).double()),
        torch.diag(torch.tensor([1e-20, 0.0, 0.0]).double()),
    )
    assert [part.shape[1] for part in _spd.ranges(left, right)] == [1, 1, 0, 1]
