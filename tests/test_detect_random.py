"""Random trees of modules: no false symmetry, no candidate that the numbers refute, no crash, and not nothing."""

import warnings
from collections import Counter
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import by_hand
import noetherflow as nf
from random_trees import TREES, planted

# Seeds at which something was wrong once: (tree, seed, training).
ONCE_WRONG: list[tuple[Any, int, bool]] = [
    (("twice", ("twice", 16, 16), ("chain", 16, 16)), 0, False),  # activations of 1e-113
    (("twice", ("twice", 16, 0), ("chain", 16, 16)), 0, False),  # a module under two names
    (("twice", ("sum", 43, 39), 43), 65100, False),  # a padded zero beside a number that a matrix would mix with it
    (("again", 61, ("twice", 85, 49)), 33147, True),  # buffers of a shared module that are written to twice
    (("twice", ("chain", 77, 0), ("product", 83, ("twice", 2, 0))), 21896, False),  # gradients of 1e-17 are rounding
    (("twice", ("again", 77, 53), ("chain", 5, 27)), 37938, False),  # gradients of 1e-31, likewise
]


def check(tree: Any, seed: int, training: bool) -> int:
    """The number of symmetries of a tree, each compared with losses at other parameters, buffers and examples."""
    model, loss, batch = planted(tree, seed, training=training)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a candidate that is rejected is a rule that is wrong
        symmetries = nf.find_symmetries(model, loss, batch)
    generator = torch.Generator().manual_seed(seed)
    fresh = tuple(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) for tensor in batch)
    for name, symmetry in symmetries.items():
        for point in (seed + 1, seed + 2):
            change = by_hand.change(model, loss, fresh, symmetry, point)
            assert change is None or change < by_hand.ROUNDING, (name, change)
    return len(symmetries)


def sweep(count: int, seed: int) -> tuple[int, int]:
    """How many trees were tested, and how many of these have a symmetry; the trees that belong to a seed."""
    seen: Counter[bool] = Counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=count, deadline=None, database=None)
    @hypothesis.given(TREES, st.integers(0, 2**16), st.booleans())
    def run(tree: Any, seed: int, training: bool) -> None:
        seen[check(tree, seed, training) > 0] += 1

    run()
    return seen.total(), seen[True]


@pytest.mark.parametrize(("tree", "seed", "training"), ONCE_WRONG)
def test_what_was_wrong_once_is_right(tree: Any, seed: int, training: bool) -> None:
    check(tree, seed, training)


def test_nothing_false_is_found() -> None:
    total, with_symmetry = sweep(60, seed=0)
    assert total >= 60
    # Where nothing is found, nothing can be false.
    assert with_symmetry >= 0.4 * total, (with_symmetry, total)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_nothing_false_is_found_in_two_thousand(part: int) -> None:
    total, with_symmetry = sweep(250, seed=1 + part)
    assert with_symmetry >= 0.4 * total, (with_symmetry, total)
