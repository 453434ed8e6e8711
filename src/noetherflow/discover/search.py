r"""Null spaces of gradients at random points, with the evidence for each.

Every generator A of a symmetry solves $\nabla\ell(\theta, z) \cdot A\theta = 0$ at all points and examples. Rows of
coefficients at finitely many points have a null space that is too large if the points say too little, for instance if a
ReLU network is dead at most of them. Therefore:

1. Rows without a gradient do not count, and rows far below the typical length are rounding and are left out.
2. Solutions are tested at fresh points, which were not used to find them, with parameters of several sizes. A row that
   a solution fails becomes a further equation, and the test starts again.
3. The test ends when every unknown that a gradient reached has a coefficient in `FRESH` fresh rows in succession, and
   if examples differ by integers, when each of them was tested. Examples that reach a rare unknown, such as an entry of
   an embedding, are repeated.
4. Residuals between rounding and a clear violation are decided by solving again with more rows.
5. If the stated number of points is used up first, the search is undecided, and says why.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from noetherflow._precision import TOLERANCES
from noetherflow._progress import track
from noetherflow.discover.equations import NullSpace, Thresholds, enough, null_space, refine
from noetherflow.discover.points import Points, Sample, Tensors

# Fresh rows in which every unknown has a coefficient, all of them solved, before a solution is accepted.
FRESH = 100
# Points of a search: this many, or this many times the number of equations that are needed, whichever is more.
LEAST_BUDGET = 50_000
BUDGET_FACTOR = 20
# Without any gradient at this many points, no budget would suffice.
_HOPELESS = 10_000
# Rows shorter than this, relative to the longest, are rounding of longer terms that cancel.
ROUNDING = 1e-9
# Rows shorter than this, relative to the median, keep their ratio to it, because they carry more rounding.
_SHORT = 1e-3
# Gradients shorter than this, relative to the losses, are rounding.
_OF_LOSS = 1e-13
# Sizes of parameters at fresh points: some nonlinearities are linear near zero, and some are constant far away.
_SCALES = (1.0, 0.3, 3.0, 0.03, 30.0)
# At extreme sizes rounding grows (a saturated softmax), so that only residuals above this count.
_EXTREME = (0.03, 30.0)
_LARGE = 1e-3
_FRESH_CHUNK = 128
# How often the equations are solved, each time with more rows, while the result is not clear.
_SOLUTIONS = 4
# Number of points of each size of parameters that are transformed.
_MOST_MOVED = 64
# An example without a gradient at this many points counts as tested.
_PATIENCE = 20

Features = Callable[[Tensors, Tensors], Tensor]


@final
@dataclass(frozen=True, eq=False)
class Solution:
    """The null space of a search.

    Args:
        vectors: An orthonormal basis of the solutions, shape (k, unknowns).
        gap: (largest singular value taken for zero, smallest taken for more).
        note: Why the search is undecided; empty if it is decided.
    """

    vectors: Tensor
    gap: tuple[float, float]
    note: str = ""


@final
@dataclass
class RowScale:
    """The typical length of rows, for parameters of one size."""

    longest: float
    typical: float = 0.0

    @staticmethod
    def of(points: Points) -> "RowScale":
        """No row is known yet, but the size of the losses is."""
        return RowScale(_OF_LOSS / ROUNDING * points.scale)

    def select(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that are more than rounding, at length 1 or (short rows) less, and a mask of them."""
        lengths = rows.norm(dim=1)
        self.longest = max(self.longest, float(lengths.max()) if len(lengths) else 0.0)
        kept = lengths > ROUNDING * self.longest
        if not kept.any():
            return rows[kept], kept
        self.typical = self.typical or float(lengths[kept].median())
        return rows[kept] / lengths[kept].clamp_min(_SHORT * self.typical)[:, None], kept


@final
@dataclass
class Search:
    """A search for the vectors that are orthogonal to rows of coefficients at random points.

    Args:
        points: The source of points.
        features: The rows at given parameters and gradients, shape (m, unknowns).
        unknowns: The number of unknowns.
        what: A description for the progress bar.
        progress: Whether a progress bar is shown.
    """

    points: Points
    features: Features
    unknowns: int
    what: str
    progress: bool
    drawn: int = 0
    _scales: dict[float, RowScale] = field(default_factory=dict)

    @property
    def budget(self) -> int:
        """The largest number of points that are drawn."""
        return max(LEAST_BUDGET, BUDGET_FACTOR * enough(self.unknowns), 2 * _PATIENCE * self.points.count)

    def run(self) -> Solution:
        """Solve the equations, and test the solutions at fresh points; what is not clear is solved with more rows."""
        thresholds = Thresholds.of(self.points.precision)
        rows = torch.zeros(0, self.unknowns, dtype=torch.float64)
        null, further = NullSpace(rows, (0.0, 0.0)), self._informative_rows()
        for _ in range(_SOLUTIONS):
            if further is None:
                return self._exhausted()
            rows = torch.cat([rows, further])
            null = null_space(rows, thresholds)
            if null.is_clear(thresholds):
                outcome = self._confirm(null, thresholds)
                if isinstance(outcome, Solution):
                    return outcome
                further = outcome
            else:
                further = self._informative_rows()
        return Solution(
            null.vectors,
            null.gap,
            f"after {self.drawn} points, singular values of {null.gap[0]:.1e} (taken for zero) and {null.gap[1]:.1e} "
            "(taken for more) or residuals at fresh points are too close to rounding to tell symmetries from "
            "almost-symmetries",
        )

    def _informative_rows(self) -> Tensor | None:
        """As many rows as the unknowns need; None if the budget does not suffice."""
        needed, collected, count = enough(self.unknowns), [], 0
        end = self.drawn + self.budget
        bar = iter(track(range(needed), self.what, total=needed, shown=self.progress))
        while count < needed:
            if self.drawn >= end or (self.drawn >= _HOPELESS and not count):
                return None
            # After a sample that was not sufficient, rows without a gradient are frequent.
            size = self.points.at_once if self.drawn else min(self.points.at_once, needed)
            rows, _, _ = self._rows(size, 1.0)
            collected.append(rows)
            for _ in collected[-1]:
                next(bar, None)
            count += len(collected[-1])
        next(bar, None)
        return torch.cat(collected)

    def _confirm(self, null: NullSpace, thresholds: Thresholds) -> Solution | Tensor:
        """Test solutions at fresh points until none fails, or until the budget is used up.

        Args:
            null: The solutions.
            thresholds: Which singular values are zero.

        Returns:
            The outcome, or the rows of the fresh points if they are not clear about the solutions.
        """
        evidence = _Evidence(self.unknowns, self.points.count)
        vectors, gap, fresh = null.vectors, null.gap, []
        end = self.drawn + self.budget
        chunk = min(_FRESH_CHUNK, self.points.at_once)
        scales = 0
        while len(vectors) and not (evidence.suffices(self.points.needs_every_example) and scales >= len(_SCALES)):
            if self.drawn >= end:
                return Solution(vectors, gap, evidence.shortage(self.drawn))
            examples = evidence.informative_examples(chunk // 2)
            scale = _SCALES[scales % len(_SCALES)]
            rows, kept, tested = self._rows(chunk, scale, examples)
            if scale not in _EXTREME:
                fresh.append(rows)
            scales += 1
            is_extreme = scale in _EXTREME
            further = refine(vectors, rows @ vectors.T, Thresholds(_LARGE, _LARGE) if is_extreme else thresholds)
            if not is_extreme:
                if not further.is_clear(thresholds):
                    return torch.cat(fresh)
                gap = (max(gap[0], further.gap[0]), min(gap[1], further.gap[1]))
            if len(further.vectors) < len(vectors):
                vectors, scales = further.vectors, 0
                evidence.restart()
            evidence.add(rows, kept, tested, thresholds.clear)
        return Solution(vectors, gap)

    def _rows(self, count: int, scale: float, examples: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Informative rows of new points, which of the points have one, and the examples of all points."""
        sample: Sample = self.points.sample(count, scale, examples)
        self.drawn += sample.drawn
        rows = self.features(sample.params, sample.gradients).to("cpu", torch.float64)
        known = self._scales.setdefault(scale, RowScale.of(self.points))
        chosen, kept = known.select(rows)
        return chosen, kept, sample.examples

    def _exhausted(self) -> Solution:
        none = torch.zeros(0, self.unknowns, dtype=torch.float64)
        return Solution(
            none,
            (0.0, 0.0),
            f"{enough(self.unknowns)} points with a gradient are needed, and {self.drawn} random points had fewer: "
            "almost everywhere the loss does not depend on the parameters",
        )


def jump(points: Points, count: int, act: Callable[[Tensor, Tensors], Tensors]) -> str:
    """Whether finite transformations change losses, although the gradients do not see it.

    The gradient of a loss that jumps, for instance of a network that rounds its activations, says nothing about jumps.

    Args:
        points: The source of points.
        count: The number k of generators.
        act: The parameters after a finite transformation with coordinates of shape (k,), given stacked parameters.

    Returns:
        A sentence that names the change; empty if there is none.
    """
    if not count:
        return ""
    coordinates = torch.randn(count, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    worst = 0.0
    for scale in _SCALES:
        changes = points.changes(min(_MOST_MOVED, points.at_once), scale, lambda params: act(coordinates, params))
        if len(changes) and (scale not in _EXTREME or float(changes.max()) > _LARGE):
            worst = max(worst, float(changes.max()))
    if worst <= TOLERANCES[points.precision].proof:
        return ""
    return (
        f"finite transformations change losses by up to {worst:.1e}, although every gradient is orthogonal to the "
        "generators: the loss jumps, or the points that were drawn are all of one kind"
    )


@final
class _Evidence:
    """How many fresh rows in succession had a coefficient of each unknown, and in which example."""

    def __init__(self, unknowns: int, examples: int) -> None:
        self._rows = torch.zeros(unknowns, dtype=torch.long)
        self._reached = torch.zeros(unknowns, dtype=torch.bool)
        # An example in whose row each unknown had a coefficient.
        self._source = torch.zeros(unknowns, dtype=torch.long)
        self._tests = torch.zeros(examples, dtype=torch.long)

    def add(self, rows: Tensor, kept: Tensor, examples: Tensor, least: float) -> None:
        """Count rows with coefficients above `least`; `kept` says which points, of which `examples`, have a row."""
        present = rows.abs() > least
        self._rows += present.sum(0)
        self._reached |= present.any(0)
        weights = torch.where(kept, _PATIENCE, 1)
        self._tests.index_add_(0, examples, weights)
        if len(rows):
            first = present.to(torch.int8).argmax(0)
            self._source = torch.where(present.any(0), examples[kept][first], self._source)

    def restart(self) -> None:
        """Count from zero, because the solutions have changed."""
        self._rows.zero_()
        self._tests.zero_()

    def suffices(self, every_example: bool) -> bool:
        """Whether every unknown that a gradient reached has enough rows."""
        tested = not every_example or bool((self._tests >= _PATIENCE).all())
        return tested and bool((self._rows[self._reached] >= FRESH).all())

    def informative_examples(self, count: int) -> Tensor | None:
        """Up to `count` examples that reached unknowns with too few rows."""
        lacking = self._reached & (self._rows < FRESH)
        if not lacking.any():
            return None
        sources = self._source[lacking].unique()
        return sources.repeat(-(-count // len(sources)))[:count]

    def shortage(self, drawn: int) -> str:
        """Why the evidence does not suffice."""
        lacking = self._reached & (self._rows < FRESH)
        return (
            f"after {drawn} points, {int(lacking.sum())} of {len(lacking)} unknowns have a gradient at fewer than "
            f"{FRESH} points, or an example is not tested, since the last change of the solutions"
        )
