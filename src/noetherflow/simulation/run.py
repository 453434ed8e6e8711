"""Simulating the training of many replicas at once."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.func import vmap

from noetherflow._errors import EmptyDataError, FrozenParameterError, ParameterShapeError, SettingsError
from noetherflow._model_function import ModelFunction
from noetherflow._optimizers import SGD
from noetherflow._params import aliases, copy_of, require_finite, require_names, snapshot
from noetherflow._per_example import require_uncoupled
from noetherflow._progress import track
from noetherflow._types import Batch, Loss, Params
from noetherflow.noise import estimate_noise
from noetherflow.simulation.dynamics import GradientDescent, GradientFlow, Langevin, Schedule
from noetherflow.simulation.fused import ReplicaGradients
from noetherflow.simulation.integrate import Integrator, by_diffusion, by_flow, by_steps
from noetherflow.simulation.noether import NoetherFlow, OrbitIntegrator
from noetherflow.simulation.stream import FiniteStream, FullBatch, Minibatches, OnlineStream, Sampler
from noetherflow.simulation.trajectory import Trajectory
from noetherflow.symmetry import Symmetry

Dynamics = SGD | GradientDescent | GradientFlow | Langevin | NoetherFlow
Observable = Callable[[Params], Tensor]

_RECORDS = 200
# Multiplications in a step (parameters times examples) below which one thread is enough.
_SMALL_STEP = 10**8


def simulate(
    model: nn.Module,
    loss: Loss,
    data: Batch | Sampler,
    dynamics: Dynamics,
    *,
    steps: int,
    replicas: int | None = None,
    start: Params | None = None,
    symmetries: Mapping[str, Symmetry] | None = None,
    observables: Mapping[str, Observable] | None = None,
    record: int | Sequence[int] | None = None,
    schedule: Schedule | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    progress: bool = True,
) -> Trajectory:
    r"""Simulate the training of many replicas at once, and record what matters of it.

    All replicas take each step together. They differ by their starting points and by the examples that they see: every
    replica draws its own. A replica that diverges becomes NaN and disturbs no other.

    Args:
        model: Any module; it is not changed.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        data: A data set (tensors that share their leading dimension, in any containers), or a distribution: a function
            `sample(count, generator)` that returns a batch of that many fresh examples. Only SGD can do with a
            distribution. With `SGD(replacement=False)`, every replica goes through the data set in epochs of its own
            order.
        dynamics: `SGD` (steps of `torch.optim.SGD` with these settings), `GradientDescent`, `GradientFlow`, `Langevin`
            (the diffusion limit of SGD), or `NoetherFlow` (the motion along the symmetries alone).
        steps: How many.
        replicas: How many; by default as many as `start` holds, else 1.
        start: Parameters of every replica, shape (R, *parameter) by name; by default the model's own for all.
        symmetries: Whose charges to record; for the Noether flow, those along which it moves.
        observables: What else to record: functions of one replica's parameters that return a tensor.
        record: Every how many steps, or at which steps; by default about 200 times. The start and the end are always
            recorded. A record shows the parameters before the update of its step.
        schedule: A factor on the learning rate by step, for SGD and gradient descent.
        generator: Source of all randomness; by default one with seed 0. Dropout draws from PyTorch's own.
        dtype: Floating-point type of the simulation.
        progress: Show a progress bar on a terminal.

    Returns:
        The trajectory, on the CPU.

    Raises:
        SettingsError: If dynamics, data and settings do not go together.
        FrozenParameterError: If `start` gives a parameter that does not require gradients.
        ParameterNameError: If `start` or a symmetry names parameters that the model does not have.
        ParameterShapeError: If their shapes do not fit.
        EmptyDataError: If there is no example.
        LossError: If the loss does not return one number per example.

    Examples:
        Four replicas of a scale-invariant loss, whose squared norm only SGD can change:

        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> loss = lambda model, z: -model(z).squeeze(1) / model.weight.norm()
        >>> length = {"length": nf.ScalarSymmetry(plus=[nf.Axis("weight", 0)])}
        >>> sample = lambda count, generator: torch.randn(count, 2, generator=generator) + 1
        >>> trajectory = nf.simulate(
        ...     net, loss, sample, nf.SGD(lr=0.1, batch_size=1), steps=100, replicas=4, symmetries=length)
        >>> charge = trajectory.charges["length"]
        >>> charge.shape, bool((charge[-1] > charge[0]).all())
        (torch.Size([101, 4]), True)

    Source: the dynamics of Ziyin et al. (2024), section 3.
    """
    if not isinstance(dynamics, Dynamics):
        raise SettingsError(
            f"expected SGD, GradientDescent, GradientFlow, Langevin or NoetherFlow as dynamics, got {dynamics!r}"
        )
    if schedule is not None and not isinstance(dynamics, (SGD, GradientDescent)):
        raise SettingsError(
            f"a schedule scales the learning rate of SGD or GradientDescent; {type(dynamics).__name__} has none"
        )
    when = _schedule_of_records(steps, record)
    require_uncoupled(model)
    generator = generator or torch.Generator().manual_seed(0)
    replicated = _replicate(model, start, replicas, dtype)
    resolved = {name: symmetry.rename(aliases(model)) for name, symmetry in (symmetries or {}).items()}
    one = {name: stack[0] for name, stack in (replicated.moving | replicated.fixed).items()}
    for symmetry in resolved.values():
        symmetry.check(one)
    device = next(iter(replicated.moving.values())).device
    stream = _stream(dynamics, data, dtype, device)
    integrator = _integrator(dynamics, model, loss, stream, replicated, resolved, schedule, generator, dtype)
    recorder = _Recorder(
        {
            **{f"charges/{n}": s.charge for n, s in resolved.items()},
            **{f"observables/{n}": o for n, o in (observables or {}).items()},
        }
    )
    with torch.no_grad(), _threads(_work(dynamics, stream, replicated.moving)):
        for step in track(range(steps), type(dynamics).__name__, shown=progress):
            if step in when:
                recorder.see(step, integrator.params, replicated.fixed)
                recorder.losses.append(integrator.advance_watched(step))
            else:
                integrator.advance(step)
        final = integrator.params
        recorder.see(steps, final, replicated.fixed)
        # One more step, for its loss alone; a schedule need not know of it.
        recorder.losses.append(integrator.advance_watched(steps - 1))
    return recorder.trajectory(final)


def _work(dynamics: Dynamics, stream: FiniteStream | OnlineStream, moving: Params) -> int:
    """Multiplications in a step, roughly."""
    examples = 1
    if isinstance(dynamics, SGD):
        examples = dynamics.batch_size
    elif isinstance(stream, FiniteStream):
        examples = stream.count
    return examples * sum(stack.numel() for stack in moving.values())


@contextlib.contextmanager
def _threads(work: int) -> Iterator[None]:
    """One thread where a step is small work.

    There a second thread gains nothing, and waiting for it at every operation costs a great deal (measured: 35 times)
    as soon as another program wants its core.
    """
    before = torch.get_num_threads()
    if work < _SMALL_STEP:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@final
@dataclass(frozen=True)
class _Replicated:
    """Stacked parameters: those that train, and those that are frozen."""

    moving: dict[str, Tensor]
    fixed: dict[str, Tensor]


@final
class _Recorder:
    """Collects what is asked for, vectorised over replicas where that is possible."""

    def __init__(self, quantities: Mapping[str, Observable]) -> None:
        self._quantities = dict(quantities)
        self.steps: list[int] = []
        self.losses: list[Tensor] = []
        self._seen: dict[str, list[Tensor]] = {name: [] for name in quantities}

    def see(self, step: int, moving: dict[str, Tensor], fixed: dict[str, Tensor]) -> None:
        self.steps.append(step)
        stacks = moving | fixed
        for name, quantity in self._quantities.items():
            self._seen[name].append(self._evaluate(quantity, stacks).detach().clone())

    def trajectory(self, final: dict[str, Tensor]) -> Trajectory:
        groups: dict[str, dict[str, Tensor]] = {"charges": {}, "observables": {}}
        for key, values in self._seen.items():
            kind, _, name = key.partition("/")
            groups[kind][name] = torch.stack(values).cpu()
        params = {name: stack.detach().clone().cpu() for name, stack in final.items()}
        return Trajectory(torch.tensor(self.steps), torch.stack(self.losses).cpu(), params=params, **groups)

    def _evaluate(self, quantity: Observable, stacks: dict[str, Tensor]) -> Tensor:
        try:
            return vmap(quantity)(stacks)
        except Exception:
            # An observable may do what cannot be vectorised (.item(), a branch on a value): then one by one.
            count = len(next(iter(stacks.values())))
            return torch.stack([torch.as_tensor(quantity({n: s[i] for n, s in stacks.items()})) for i in range(count)])


def _schedule_of_records(steps: int, record: int | Sequence[int] | None) -> set[int]:
    if not isinstance(steps, int) or steps < 1:
        raise SettingsError(f"steps must be a whole number, 1 or more, got {steps!r}")
    if record is None:
        record = max(1, steps // _RECORDS)
    if isinstance(record, int):
        if record < 1:
            raise SettingsError(f"record must be 1 or more, or a sequence of steps, got {record}")
        return {0, *range(0, steps, record)}
    outside = [step for step in record if not 0 <= step <= steps]
    if outside:
        raise SettingsError(f"record names steps outside 0 .. {steps}: {outside[:5]}")
    return {0, *record}


def _replicate(model: nn.Module, start: Params | None, replicas: int | None, dtype: torch.dtype) -> _Replicated:
    own = snapshot(model, dtype)
    require_finite(own, "parameter")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise SettingsError("the model has no parameter that requires gradients: there is nothing to simulate")
    given = snapshot(start, dtype) if start is not None else {}
    require_names(own, given, "start")
    if frozen := sorted(set(given) - trained):
        raise FrozenParameterError(
            f"start gives {frozen}, which do not require gradients: all replicas share the model's own. Leave them out"
        )
    counts = {name: len(stack) if stack.ndim else 0 for name, stack in given.items()}
    count = replicas if replicas is not None else next(iter(counts.values()), 1)
    if not isinstance(count, int) or count < 1:
        raise SettingsError(f"replicas must be a whole number, 1 or more, got {count!r}")
    for name, stack in given.items():
        if stack.shape != (count, *own[name].shape):
            raise ParameterShapeError(
                f"start[{name!r}] must have shape {(count, *own[name].shape)}, one parameter per replica, got "
                f"{tuple(stack.shape)}"
            )
    stacks = {
        name: given.get(name, tensor.expand(count, *tensor.shape).clone()).to(tensor.device)
        for name, tensor in own.items()
    }
    return _Replicated(
        {n: s for n, s in stacks.items() if n in trained}, {n: s for n, s in stacks.items() if n not in trained}
    )


def _stream(
    dynamics: Dynamics, data: Batch | Sampler, dtype: torch.dtype, device: torch.device
) -> FiniteStream | OnlineStream:
    if not callable(data):
        independent = not isinstance(dynamics, SGD) or dynamics.replacement
        stream = FiniteStream(data, dtype, device, replacement=independent)
        if not independent and isinstance(dynamics, SGD) and dynamics.batch_size > stream.count:
            raise SettingsError(f"batch_size {dynamics.batch_size} exceeds the {stream.count} examples of the data set")
        return stream
    if not isinstance(dynamics, SGD):
        raise SettingsError(
            f"{type(dynamics).__name__} needs the full gradient: give a finite data set, not a function that draws "
            "examples"
        )
    if not dynamics.replacement:
        raise SettingsError("drawing without replacement needs a finite data set, not a function that draws examples")
    return OnlineStream(data, dtype, device)


def _integrator(
    dynamics: Dynamics,
    model: nn.Module,
    loss: Loss,
    stream: FiniteStream | OnlineStream,
    start: _Replicated,
    symmetries: Mapping[str, Symmetry],
    schedule: Schedule | None,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> Integrator:
    # Frozen parameters are the same for all replicas.
    fixed = {name: stack[0] for name, stack in start.fixed.items()}
    gradients = ReplicaGradients(model, loss, list(start.moving), fixed, stream.rebuild, dtype)
    replicas = len(next(iter(start.moving.values())))
    if isinstance(dynamics, SGD):
        source = Minibatches(stream, replicas, dynamics.batch_size, generator)
        return by_steps(start.moving, gradients, dynamics, source, schedule)
    if not isinstance(stream, FiniteStream):
        raise EmptyDataError("there is no data set")
    full = FullBatch(stream)
    match dynamics:
        case GradientDescent():
            return by_steps(start.moving, gradients, dynamics.settings(), full, schedule)
        case GradientFlow():
            return by_flow(start.moving, gradients, dynamics, full)
        case Langevin():
            return by_diffusion(start.moving, gradients, dynamics, full, generator)
    return _orbits(dynamics, model, loss, full, start, symmetries, stream, dtype)


def _orbits(
    flow: NoetherFlow,
    model: nn.Module,
    loss: Loss,
    full: FullBatch,
    start: _Replicated,
    symmetries: Mapping[str, Symmetry],
    stream: FiniteStream,
    dtype: torch.dtype,
) -> Integrator:
    batch = stream.rebuild(full.next())
    function = ModelFunction(model, loss, dtype)
    starts, means = [], []
    for replica in range(len(next(iter(start.moving.values())))):
        params = {name: stack[replica] for name, stack in start.moving.items()}
        means.append(function.losses(params, batch).mean())
        noise = flow.noise
        if noise is None:
            placed = _placed(model, params, dtype)
            noise = estimate_noise(placed, loss, [batch], symmetries, progress=False)
        starts.append((params, noise))
    return OrbitIntegrator(flow, symmetries, starts, torch.stack(means))


def _placed(model: nn.Module, params: Params, dtype: torch.dtype) -> nn.Module:
    """A copy of the model with other parameters."""
    placed = copy_of(model, dtype)
    with torch.no_grad():
        for name, parameter in placed.named_parameters():
            if name in params:
                parameter.copy_(params[name])
    return placed
