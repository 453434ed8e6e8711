"""What is computed on every device: a model, its data, and the functions of the package that see tensors of a model."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import noetherflow as nf
from noetherflow._batch import cast

CPU = torch.device("cpu")
SGD = nf.SGD(lr=0.1, batch_size=4, weight_decay=1e-2)


@dataclass(frozen=True)
class Subject:
    """A model with its loss, batches and symmetries, all on a device."""

    model: nn.Module
    loss: nf.Loss
    batches: list[Any]
    symmetries: dict[str, nf.Symmetry] | None = None
    wrong: dict[str, nf.Symmetry] = field(default_factory=dict)

    def on(self, *devices: torch.device) -> "Subject":
        """A copy with the parameters on devices in turn, and the data on the first of these devices."""
        from pretended import placed

        owners = list(dict.fromkeys(name.rpartition(".")[0] for name, _ in self.model.named_parameters()))
        model = placed(self.model, lambda name: devices[owners.index(_owner(name, owners)) % len(devices)])
        batches = [cast(batch, None, devices[0]) for batch in self.batches]
        return replace(self, model=model, batches=batches)

    @property
    def along_axes(self) -> dict[str, nf.Symmetry]:
        """The symmetries that a meter measures."""
        return {name: s for name, s in (self.symmetries or {}).items() if not isinstance(s, nf.DenseSymmetry)}

    def noise(self, *, exact: bool) -> nf.NoiseMoments:
        """The noise over all batches."""
        return nf.estimate_noise(self.model, self.loss, self.batches, self.symmetries, exact=exact, progress=False)


def _owner(name: str, owners: list[str]) -> str:
    return max((owner for owner in owners if name.startswith(owner)), key=len, default=owners[0])


def of_noise(noise: nf.NoiseMoments) -> Any:
    """Every statistic, that of the mean gradient if it was kept."""
    return noise.count, noise.mean, noise.grams, noise.variance, noise.trace, noise.standard_errors


def moments(subject: Subject) -> Any:
    return of_noise(subject.noise(exact=True))


def merged(subject: Subject) -> Any:
    halves = [Subject(subject.model, subject.loss, [batch], subject.symmetries) for batch in subject.batches[:2]]
    first, second = (half.noise(exact=True) for half in halves)
    return of_noise(first.merge(second))


def rates(subject: Subject) -> Any:
    noise = subject.noise(exact=True)
    params = dict(subject.model.named_parameters())
    charges = [s.charge({n: params[n].detach() for n in s.names}).cpu() for s in noise.symmetries.values()]
    return charges, nf.drift(noise, SGD, subject.model), nf.expected_step(noise, SGD, subject.model)


def solved(subject: Subject) -> Any:
    noise = subject.noise(exact=True)
    found = nf.solve_equilibrium(noise, SGD, subject.model)
    here = nf.potential(noise, SGD, subject.model), nf.potential(noise, SGD, subject.model, found.coordinates)
    return here, found.params, found.coordinates, found.relaxation_steps


def equilibrated(subject: Subject) -> Any:
    given = subject.model, subject.loss, subject.batches, SGD, subject.symmetries
    found = nf.equilibrate(*given, progress=False, holdout=subject.batches[:1])
    return found.params, found.coordinates, found.potential_after, found.trace_after, found.standard_error


def rebalanced(subject: Subject) -> Any:
    """The model after a move and a step of its optimizer, whose state moved too; and after the way back."""
    model = copy.deepcopy(subject.model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = subject.loss(model, subject.batches[0])
    losses.mean().backward()
    optimizer.step()
    found = nf.equilibrate(model, subject.loss, subject.batches, SGD, subject.symmetries, progress=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the s")  # second moments, state: estimates
        moved = nf.rebalance_(model, found, subject.loss, subject.batches[0], optimizer=optimizer)
    after = _on_cpu(dict(model.named_parameters()))
    optimizer.step()
    stepped = _on_cpu(dict(model.named_parameters()))
    moved()
    return after, stepped, _on_cpu(dict(model.named_parameters()))


def verified(subject: Subject) -> Any:
    """Whether declared symmetries are proved, and the residuals of false symmetries."""

    def residual(symmetry: nf.Symmetry) -> Any:
        return nf.verify_symmetry(subject.model, subject.loss, subject.batches[0], symmetry)

    proved = [float(residual(symmetry)) < 1e-9 for symmetry in (subject.symmetries or {}).values()]
    return proved, [[r.loss, r.gradient, r.example] for r in map(residual, subject.wrong.values())]


def detected(subject: Subject) -> Any:
    return [(name, repr(s)) for name, s in nf.find_symmetries(subject.model, subject.loss, subject.batches[0]).items()]


def discovered(subject: Subject) -> Any:
    given = subject.model, subject.loss, subject.batches[0]
    rescalings = nf.discover_rescalings(*given, progress=False)
    result: list[Any] = [rescalings.exponents, rescalings.reached, rescalings.decided]
    if sum(p.numel() for p in subject.model.parameters()) <= 40:
        generators = nf.discover_generators(*given, progress=False)
        result += [generators.symmetric, generators.antisymmetric, generators.decided]
    return result


def simulated(subject: Subject) -> Any:
    data = subject.batches[0]
    noise = (
        nf.SGD(lr=0.01, batch_size=2, momentum=0.5),
        nf.SGD(lr=0.01, batch_size=2, replacement=False, dataset_size=24),
    )
    kinds = (*noise, nf.Langevin(SGD), nf.GradientFlow(dt=0.01))
    runs = [
        nf.simulate(subject.model, subject.loss, data, kind, steps=3, replicas=2, symmetries=subject.symmetries)
        for kind in kinds
    ]
    return [(run.loss, run.charges, run.params) for run in runs]


def flowed(subject: Subject) -> Any:
    flow = nf.NoetherFlow(SGD, dt=0.5)
    given = subject.model, subject.loss, subject.batches[0], flow
    run = nf.simulate(*given, steps=2, symmetries=subject.symmetries)
    return run.loss, run.charges, run.params


def between_microbatches(subject: Subject) -> Any:
    model = copy.deepcopy(subject.model)
    meter = nf.MicrobatchMeter(model, subject.along_axes, variances=True)
    with meter.step() as done:
        for batch in subject.batches:
            losses = subject.loss(model, batch)
            losses.mean().backward()
            done(size=len(losses))
    return of_noise(meter.noise)


def analysed(subject: Subject) -> Any:
    given = subject.model, subject.loss, subject.batches, SGD, subject.symmetries
    found = nf.analyze(*given, progress=False)
    return [(r.name, r.charge, r.noise_plus, r.noise_minus, r.drift, r.distance, r.status) for r in found.reports]


def in_one_pass(subject: Subject) -> Any:
    return of_noise(subject.noise(exact=False))


def while_training(subject: Subject) -> Any:
    model = copy.deepcopy(subject.model)
    meter = nf.NoiseMeter(model, subject.along_axes, variances=True)
    for batch in subject.batches:
        with meter.step(batch):
            subject.loss(model, batch).mean().backward()
    return of_noise(meter.noise), _on_cpu({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


Run = Callable[[Subject], Any]
RUNS: dict[str, Run] = {
    run.__name__: run
    for run in (
        moments, merged, rates, solved, equilibrated, rebalanced, verified, detected, discovered, simulated, flowed,
        between_microbatches, analysed,
    )
}  # fmt: skip
# What the kernels of the noise compute: add `| FAST` to the runs of test_devices.py.
FAST: dict[str, Run] = {run.__name__: run for run in (in_one_pass, while_training)}


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def require_equal(found: Any, expected: Any, rtol: float = 1e-9) -> None:
    """Raise unless every number is equal up to rounding, and every tensor is on the CPU."""
    ours, theirs = tree_leaves(found), tree_leaves(expected)
    assert len(ours) == len(theirs)
    largest = max((_largest(leaf) for leaf in theirs if isinstance(leaf, Tensor)), default=0.0)
    for ours_leaf, theirs_leaf in zip(ours, theirs, strict=True):
        if isinstance(theirs_leaf, Tensor):
            assert ours_leaf.device == CPU, f"a result is on {ours_leaf.device}"
            # A gradient that vanishes, such as that of a key's bias, is the rounding of larger gradients.
            slack = max(rtol * _largest(theirs_leaf), 100 * rtol**2 * largest)
            torch.testing.assert_close(ours_leaf, theirs_leaf, rtol=rtol, atol=slack, equal_nan=True)
        elif isinstance(theirs_leaf, float):
            torch.testing.assert_close(torch.tensor(ours_leaf), torch.tensor(theirs_leaf), rtol=rtol, atol=1e-9,
                                       equal_nan=True)  # fmt: skip
        else:
            assert ours_leaf == theirs_leaf
