"""The ways of measuring noise, each compared with a float64 loop over single backward passes."""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor, nn

import checks
import noetherflow as nf
import oracles

EXACT, FAST, TRAIN, MEASURE = "exact", "fast", "train", "measure"
WAYS = (EXACT, FAST, TRAIN, MEASURE)
METERS = (TRAIN, MEASURE)
# What may come of a way: every number is right; it is right for all parameters but those that are named; an error.
RIGHT, NAMED, REFUSED = "right", "named", "refused"


class Meter(Protocol):
    """What a training step needs of a meter."""

    def step(self, batch: Any, *, weight: float | None = None, train: bool = True) -> AbstractContextManager[None]: ...


class NoMeter:
    """A plain training step."""

    def step(self, batch: Any, *, weight: float | None = None, train: bool = True) -> AbstractContextManager[None]:
        return nullcontext()


Step = Callable[[nn.Module, nf.Loss, Any, Meter, bool], None]


def mean_step(model: nn.Module, loss: nf.Loss, batch: Any, meter: Meter, train: bool) -> None:
    with meter.step(batch, train=train):
        loss(model, batch).mean().backward()


def precision_of(dtype: torch.dtype) -> float:
    """Relative error allowed of a sum of squares of gradients: a dozen roundings, more than enough in float64."""
    return 1e-9 if dtype is torch.float64 else 12 * torch.finfo(dtype).eps


@dataclass
class Row:
    """A model, its loss, its batches, and what is expected of every way.

    Args:
        build: Makes the model, in the type in which it trains.
        loss: One loss per example.
        batches: Makes the batches.
        step: A training step.
        rtol: Relative error allowed of every statistic.
        expected: Outcomes that are allowed, by way; `RIGHT` for ways that are not given.
        error: The class of the error where a way refuses.
        says: What the error says, unless it names a parameter.
        exact_loss: The loss of the loop in float64, without autocast.
        exact_model: Changes the model of the loop, where a kernel knows no float64.
        symmetries: Whether the symmetries are found for `estimate_noise`; without them, the trace is compared.
        one_by_one: Whether `estimate_noise` forms the gradient of every example even if it should not.
    """

    build: Callable[[], nn.Module]
    loss: nf.Loss
    batches: Callable[[], Sequence[Any]]
    step: Step = mean_step
    rtol: float = 1e-9
    rounding: float = 0.0
    expected: Mapping[str, set[str]] = field(default_factory=dict)
    error: type[nf.NoetherflowError] = nf.NoetherflowError
    says: str = ""
    exact_loss: nf.Loss | None = None
    exact_model: Callable[[Any], None] | None = None
    symmetries: bool = False
    one_by_one: bool = False

    def allowed(self, way: str) -> set[str]:
        """The outcomes that are allowed."""
        return self.expected.get(way, {RIGHT})


def probes(model: nn.Module) -> dict[str, nf.Symmetry]:
    """Groups along axes that ask a meter for every kind of statistic of every parameter: symmetries or not."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    small = sum(p.numel() for p in trained.values()) < 3000
    probes: dict[str, nf.Symmetry] = {}
    for index, (name, parameter) in enumerate(trained.items()):
        first, last = nf.Axis(name, 0), nf.Axis(name, max(parameter.ndim - 1, 0))
        if small or index % 2:
            probes[f"rows of {name}"] = nf.DiagonalSymmetry(plus=[first])
        if parameter.ndim > 1 and (small or not index % 2):
            probes[f"columns of {name}"] = nf.DiagonalSymmetry(plus=[], minus=[last])
        if small:
            probes[f"size of {name}"] = nf.ScalarSymmetry(plus=[], minus=[first])
        for axis in (first, last):
            if small and parameter.ndim > 1 and axis.size(parameter) <= 8:
                probes[f"Gram along {axis.dim} of {name}"] = nf.MatrixSymmetry(plus=[axis])
    return probes


@dataclass
class Truth:
    """The gradients of single examples in float64, batch by batch."""

    model: nn.Module
    stacks: list[dict[str, Tensor]]

    @classmethod
    def of(cls, row: Row, model: nn.Module, batches: Sequence[Any]) -> "Truth":
        """By a loop over examples."""
        model, loss = copy.deepcopy(model).double(), row.exact_loss or row.loss
        if row.exact_model is not None:
            row.exact_model(model)
        return cls(model, [oracles.by_backward(model, loss, batch, _size(batch)) for batch in batches])

    def together(self) -> dict[str, Tensor]:
        """All examples, shape (N, *parameter) by name."""
        return {name: torch.cat([stack[name] for stack in self.stacks]) for name in self.stacks[0]}

    def pooled(self, symmetries: Mapping[str, nf.Symmetry], names: set[str]) -> oracles.Statistics:
        """What a meter must say of these parameters."""
        steps = [({n: g for n, g in s.items() if n in names}, torch.ones(_length(s)).double()) for s in self.stacks]
        return oracles.pooled(self.model, steps, symmetries)


def _size(batch: Any) -> int:
    """The number of examples of a batch."""
    first = next(iter(batch.values())) if isinstance(batch, dict) else batch if isinstance(batch, Tensor) else batch[0]
    return len(first)


def _length(stack: Mapping[str, Tensor]) -> int:
    return len(next(iter(stack.values())))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """A dense copy of `.grad` by name."""
    return {n: None if p.grad is None else p.grad.to_dense().clone() for n, p in model.named_parameters()}


def assert_gradients(
    found: Mapping[str, Tensor | None], plain: Mapping[str, Tensor | None], rounding: float = 0.0
) -> None:
    """Gradients equal those of a plain step, relative to the gradient of all parameters."""
    scale = sum(float(g.double().square().sum()) for g in plain.values() if g is not None) ** 0.5
    for name, expected in plain.items():
        got = found[name]
        assert (got is None) == (expected is None), f".grad of {name}: {got} instead of {expected}"
        if got is not None and expected is not None:
            off = float((got.double() - expected.double()).norm())
            # Nothing but the order of additions may differ from a plain step, and the rounding of a narrow product.
            bound = max(1e-11, 2 * torch.finfo(expected.dtype).eps, rounding) * scale
            assert off <= bound, f".grad of {name} is off by {off:.2e}, beside {scale:.2e} of all gradients"


def outcome(row: Row, way: str) -> str:
    """Measure in a way; raises AssertionError for a number that is wrong, and whatever the package raises by mistake.

    Returns:
        `RIGHT`, `NAMED` or `REFUSED`.
    """
    torch.manual_seed(0)
    model, batches = row.build(), row.batches()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    try:
        if way in METERS:
            return _metered(row, model, batches, way)
        return _estimated(row, model, batches, way)
    except nf.NoetherflowError as error:
        refusal = error
    kind, said = type(refusal).__name__, str(refusal)
    assert isinstance(refusal, row.error), f"{kind} instead of {row.error.__name__}: {said}"
    if not isinstance(refusal, nf.CoupledExamplesError):
        known = [*names, row.says] if row.says else names
        assert any(word in said for word in known), f"names neither a parameter nor a reason: {said}"
    return REFUSED


def _estimated(row: Row, model: nn.Module, batches: Sequence[Any], way: str) -> str:
    symmetries = nf.find_symmetries(model, row.loss, batches[0]) if row.symmetries else {}
    before = gradients(model)
    exact = None if way == EXACT else False
    noise = nf.estimate_noise(model, row.loss, batches, symmetries, exact=exact, progress=False)
    assert_gradients(gradients(model), before)
    _must_not_be_refused(row, way, noise)
    truth = Truth.of(row, model, batches)
    expected = oracles.statistics(truth.model, truth.together(), symmetries)
    if way == FAST and not row.one_by_one:  # the standard errors are those between batches
        expected = expected._replace(errors=truth.pooled(symmetries, set(truth.stacks[0])).errors)
    elif len(batches) > 1:  # the standard errors are those of one batch, and an approximation for several
        first = oracles.statistics(truth.model, truth.stacks[0], symmetries)
        alone = nf.estimate_noise(model, row.loss, batches[:1], symmetries, exact=exact, progress=False)
        checks.noise_is(alone, first, row.rtol)
        expected = expected._replace(errors=noise.standard_errors)
    checks.noise_is(noise, expected, row.rtol)
    scale = float(expected.trace) ** 0.5
    for name, stack in truth.together().items():
        torch.testing.assert_close(noise.mean[name], stack.mean(0), rtol=row.rtol, atol=row.rtol * scale)
    return RIGHT


def _metered(row: Row, model: nn.Module, batches: Sequence[Any], way: str) -> str:
    """Steps with a meter; `.grad` is compared after every step, also if the meter refuses it."""
    asked = probes(model)
    meter, train = nf.NoiseMeter(model, asked, variances=True), way == TRAIN
    plain = copy.deepcopy(model)
    if not train:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 7.0) if parameter.requires_grad else None
    for batch in batches:
        refusal, before = None, gradients(model)
        if train:
            row.step(plain, row.loss, batch, NoMeter(), True)
        try:
            row.step(model, row.loss, batch, meter, train)
        except nf.NoetherflowError as error:
            refusal = error
        found = gradients(model)
        if refusal is not None:
            # A step that is refused before its backward pass leaves everything as it is.
            unchanged = all(_is_equal(found[name], gradient) for name, gradient in before.items())
            if not unchanged:
                assert_gradients(found, gradients(plain) if train else before, row.rounding)
            raise refusal
        assert_gradients(found, gradients(plain) if train else before, row.rounding)
    noise = meter.noise
    _must_not_be_refused(row, way, noise)
    left_out = set(getattr(meter, "unmeasured", {}))
    assert 2 * len(left_out) <= len(asked), f"more than half of the parameters are left out: {left_out}"
    truth = Truth.of(row, model, batches)
    names = set(truth.stacks[0]) - left_out
    kept = {name: symmetry for name, symmetry in asked.items() if left_out.isdisjoint(symmetry.names)}
    assert noise.grams.keys() >= kept.keys()
    expected = truth.pooled(kept, names)
    if left_out:
        with pytest.raises(nf.SettingsError, match=re.escape(min(left_out))):
            assert noise.trace
        noise = replace(noise, unmeasured={}, total_scatter=expected.trace * noise.count)
    checks.noise_is(_restricted(noise, kept), expected, row.rtol)
    return NAMED if left_out else RIGHT


def _is_equal(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)


def _must_not_be_refused(row: Row, way: str, noise: nf.NoiseMoments) -> None:
    if not row.allowed(way) - {REFUSED}:
        raise AssertionError(f"gives {float(noise.trace):.4g} for what does not exist")


def _restricted(noise: nf.NoiseMoments, kept: Mapping[str, nf.Symmetry]) -> nf.NoiseMoments:
    """The noise of symmetries that act on measured parameters."""
    return noise if noise.grams.keys() == kept.keys() else noise.select(*kept)
