"""Sums over entries as products with vectors, against exponentials entry by entry."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import noetherflow as nf
from noetherflow._minibatch import minibatches
from noetherflow.equilibrium import entries as module
from noetherflow.equilibrium.blocks import Blocks
from noetherflow.equilibrium.commuting import CommutingOrbit
from noetherflow.equilibrium.entries import Entries, GeneralEntries, Place, SeparableEntries, entries_of
from noetherflow.equilibrium.free import Free
from noetherflow.equilibrium.roles import roles_of

CLOSE = {"rtol": 1e-13, "atol": 1e-13}
Axes = Sequence[nf.Axis]


def rows(name: str, *more: int) -> nf.Symmetry:
    """A coordinate for each row."""
    return nf.DiagonalSymmetry(nf.Axis(name, *more))


def diagonal(plus: Axes, minus: Axes = ()) -> nf.Symmetry:
    return nf.DiagonalSymmetry(tuple(plus), tuple(minus))


W, OTHER = "w", {"left": (6,), "right": (4,), "three": (3,)}
# The shape of the tensor of the terms, and the symmetries that act on it, each with a partner of its size.
SEPARABLE: dict[str, tuple[tuple[int, ...], dict[str, nf.Symmetry]]] = {
    "rows": ((6, 1), {"a": diagonal([nf.Axis(W, 0)], [nf.Axis("left", 0)])}),
    "a vector": ((6,), {"a": diagonal([nf.Axis("left", 0)], [nf.Axis(W, -1)])}),
    "a number": ((), {"a": nf.ScalarSymmetry([nf.Axis(W, 0)], [nf.Axis("left", 0)])}),
    "rows and columns": ((6, 4), {"a": rows(W, 0), "b": diagonal([nf.Axis("right", 0)], [nf.Axis(W, 1)])}),
    "from the end": ((4, 1, 6), {"a": rows(W, -1), "b": diagonal([nf.Axis("right", 0)], [nf.Axis(W, -3)])}),
    "slices": ((8, 4), {"a": diagonal([nf.Axis(W, 0, 2, 8)], [nf.Axis("left", 0)]), "b": diagonal([nf.Axis(W, 1)])}),
    "neighbours": ((4, 6), {"a": diagonal([nf.Axis("three", 0)], [nf.Axis(W, 1, repeat=2)]), "b": rows(W, 0)}),
    "numbers and rows": (
        (6, 4),
        {
            "a": nf.ScalarSymmetry([nf.Axis(W, 0)], [nf.Axis("left", 0)]),
            "b": diagonal([nf.Axis("left", 0)], [nf.Axis(W, 0)]),
            "c": nf.ScalarSymmetry([], [nf.Axis(W, 1, 1, 3)]),
        },
    ),
}  # fmt: skip
GENERAL: dict[str, tuple[tuple[int, ...], dict[str, nf.Symmetry]]] = {
    "within": ((6, 4), {"a": diagonal([nf.Axis(W, 0, within=(1, 0, 2))])}),
    "both roles": ((4, 4), {"a": diagonal([nf.Axis(W, 0)], [nf.Axis(W, 1)])}),
    "three dimensions": ((2, 3, 4), {k: diagonal([nf.Axis(W, d)]) for d, k in enumerate("abc")}),
}


def prepared(shape: tuple[int, ...], symmetries: dict[str, nf.Symmetry]) -> tuple[Entries, GeneralEntries, int]:
    """What is chosen, the reference, and the number of coordinates."""
    units = {name: torch.ones(size, dtype=torch.float64) for name, size in {W: shape, **OTHER}.items()}
    places, start = {}, 0
    for name, symmetry in symmetries.items():
        x = symmetry.identity(units)
        places[name] = Place(start, x.shape)
        start += x.numel()
    axes = [
        module.Along(symmetry, places[key], sign, axis)
        for key, symmetry in symmetries.items()
        for sign, side in ((1, symmetry.plus), (-1, symmetry.minus))
        for axis in side
        if axis.name == W
    ]
    roles = [
        (s, places[key], role) for key, s in symmetries.items() for role in roles_of(s, units) if role.axis.name == W
    ]
    return entries_of(W, units, symmetries, places), GeneralEntries(units[W], axes, roles), start


@pytest.mark.parametrize("name", [*SEPARABLE, *GENERAL])
def test_products_with_vectors_are_sums_over_entries(name: str) -> None:
    shape, symmetries = (SEPARABLE | GENERAL)[name]
    chosen, reference, count = prepared(shape, symmetries)
    assert isinstance(chosen, SeparableEntries) is (name in SEPARABLE)
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x, direction, decay, noise = draw(count), draw(count), draw(*shape).square(), draw(*shape).square()
    here, there = chosen.exponents(x), reference.exponents(x)
    for power in (1, -2):
        for degree in (1, 2):
            sides, expected = torch.zeros(2, 2, count, dtype=torch.float64)
            chosen.add(chosen.terms(noise, power, here), sides, degree)
            reference.add(reference.terms(noise, power, there), expected, degree)
            torch.testing.assert_close(sides, expected, **CLOSE)
            assert expected.any()
        total = chosen.terms(noise, power, here)[0].sum()
        torch.testing.assert_close(total, (noise * (power * there[0]).exp()).sum(), **CLOSE)
        assert not torch.allclose(total, (noise * (-power * there[0]).exp()).sum(), rtol=1e-3)  # the twin
    weighted = [(4.0, decay, 2), (1.0, noise, -1)]
    bent, expected = torch.zeros(2, 2, count, dtype=torch.float64)
    chosen.add(chosen.bend(chosen.curvature(weighted, here), chosen.exponents(direction)), bent)
    reference.add(reference.bend(reference.curvature(weighted, there), reference.exponents(direction)), expected)
    torch.testing.assert_close(bent, expected, **CLOSE)
    assert expected.any()


@pytest.mark.parametrize("name", [*SEPARABLE, *GENERAL])
def test_the_reference_is_the_derivative_of_the_sum(name: str) -> None:
    """Sums over sides and the product with the curvature, against automatic differentiation of the exponentials."""
    shape, symmetries = (SEPARABLE | GENERAL)[name]
    _, reference, count = prepared(shape, symmetries)
    generator = torch.Generator().manual_seed(1)
    x, direction = (torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(2))
    term = torch.rand(shape, generator=generator, dtype=torch.float64)

    def value(x: Tensor) -> Tensor:
        return (term * (3 * reference.exponents(x)[0]).exp()).sum()

    sides, bent = torch.zeros(2, 2, count, dtype=torch.float64)
    there = reference.exponents(x)
    reference.add(reference.terms(term, 3, there), sides)
    slope = torch.autograd.functional.jacobian(value, x)
    torch.testing.assert_close(3 * (sides[0] - sides[1]), slope, **CLOSE)
    product = torch.autograd.functional.hvp(value, x, direction)[1]
    reference.add(reference.bend(reference.curvature([(9.0, term, 3)], there), reference.exponents(direction)), bent)
    torch.testing.assert_close(bent[0] - bent[1], product, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("depth", [3, 9])
def test_a_sweep_computes_the_tensors_of_each_symmetry_alone(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both terms of weight, bias and next weight, for the forces and for the potential; not those of all tensors."""
    generator = torch.Generator().manual_seed(0)
    params: dict[str, Tensor] = {}
    for k in range(depth + 1):
        params[f"{k}.weight"] = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        params[f"{k}.bias"] = torch.randn(3, generator=generator, dtype=torch.float64)
    hidden = {
        f"{k}": diagonal([nf.Axis(f"{k}.weight", 0), nf.Axis(f"{k}.bias", 0)], [nf.Axis(f"{k + 1}.weight", 1)])
        for k in range(depth)
    }
    values = {name: tensor.square() + 1 for name, tensor in params.items()}
    moments = nf.SecondMoments(values, dict.fromkeys(values, 1), hidden)
    (orbit,) = Blocks.of(params, minibatches(moments, nf.AdamW(eps=0.0))).orbits
    assert isinstance(orbit, CommutingOrbit)
    calls, original = [], SeparableEntries.terms

    def counted(self: SeparableEntries, *arguments: Any) -> Any:
        calls.append(self)
        return original(self, *arguments)

    monkeypatch.setattr(SeparableEntries, "terms", counted)
    free = Free(torch.ones(3 * depth, dtype=torch.bool), torch.zeros(0, 3 * depth, dtype=torch.float64))
    moved = orbit._sweep(torch.zeros(3 * depth, dtype=torch.float64), free)
    assert moved.any()
    tensors_at_start, sweeps = 2 * depth + 1, 4
    assert len(calls) == 2 * tensors_at_start + sweeps * depth * (2 * 3 + 2 * 3)
