"""The public function `simulate`: the training of many replicas at once."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from noetherflow._device import CPU
from noetherflow._errors import EmptyDataError, SettingsError
from noetherflow._model_function import ModelFunction
from noetherflow._params import aliases, copy_of
from noetherflow._per_example import require_uncoupled
from noetherflow._progress import track
from noetherflow._types import Batch, Loss, Params
from noetherflow.noise import estimate_noise
from noetherflow.optimizers import SGD, AdamW, Optimizer, require_settings
from noetherflow.simulation.adamw_steps import AdamWIntegrator
from noetherflow.simulation.dynamics import GradientDescent, GradientFlow, Langevin, Schedule
from noetherflow.simulation.fused import ReplicaGradients
from noetherflow.simulation.integrate import Integrator, by_diffusion, by_flow, by_steps
from noetherflow.simulation.noether import NoetherFlow, OrbitIntegrator
from noetherflow.simulation.record import Observable, Recorder, recorded_steps
from noetherflow.simulation.replicas import Replicas, replicate
from noetherflow.simulation.stream import FiniteStream, FullBatch, Minibatches, OnlineStream, Sampler
from noetherflow.simulation.trajectory import Trajectory
from noetherflow.symmetry import Symmetry

Dynamics = SGD | AdamW | GradientDescent | GradientFlow | Langevin | NoetherFlow

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
    r"""Simulate the training of R replicas of a model at once, and record losses, charges and observables.

    All replicas take each step together. Replicas differ by their starting points and by their minibatches, which are
    drawn independently for each replica. The parameters of a replica that diverges become NaN; no other replica is
    affected.

    Args:
        model: Any module; it is not changed.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        data: A data set (tensors of shape (N, ...) in any containers), or a distribution: a function
            `sample(count, generator)` that returns a batch of `count` new examples. A distribution needs `SGD` or
            `AdamW` as dynamics. With `replacement=False` in their settings, every replica goes through the data set in
            epochs, in a random order of the replica.
        dynamics: `SGD` (steps of `torch.optim.SGD` with these settings), `AdamW` (steps of `torch.optim.AdamW`, or of
            `torch.optim.Adam` with `decoupled=False`, from averages that are zero; needs `batch_size`),
            `GradientDescent`, `GradientFlow`, `Langevin` (the diffusion limit of SGD), or `NoetherFlow` (the drift
            along the symmetries, without other motion).
        steps: Number of steps.
        replicas: Number of replicas R; by default the leading dimension of `start`, or 1 without `start`.
        start: Parameters of every replica, shape (R, *parameter) by name; by default the model's parameters.
        symmetries: The symmetries whose charges are recorded; the Noether flow moves along these symmetries.
        observables: Functions that return a tensor, whose values are recorded. The argument is the state of one
            replica: a mapping from names to parameters. Its attribute `second_moments` maps names to the bias-corrected
            averages of squares of gradients under `AdamW`, and is empty otherwise.
        record: Interval between records in steps, or the steps themselves; by default about 200 records. The start and
            the end are always recorded. A record shows the parameters before the update of its step.
        schedule: Factor on the learning rate as a function of the step, for `SGD`, `AdamW` and `GradientDescent`.
        generator: Source of all random numbers except those of dropout, which come from PyTorch's global generator; by
            default a generator with seed 0.
        dtype: Floating-point type of the simulation.
        progress: Show a progress bar on a terminal.

    Returns:
        The trajectory, on the CPU.

    Raises:
        SettingsError: If dynamics, data and settings do not fit together.
        FrozenParameterError: If `start` gives a parameter that does not require gradients.
        ParameterNameError: If `start` or a symmetry names parameters that the model does not have.
        ParameterShapeError: If the shapes of `start`, or the axes of a symmetry, do not fit the model.
        NonFiniteError: If a parameter of the model is NaN or infinite.
        CoupledExamplesError: If a layer of the model normalises over the batch.
        EmptyDataError: If there is no example.
        LossError: If the loss does not return one number per example.

    Examples:
        Four replicas of a scale-invariant loss. Gradient flow conserves the squared norm, SGD lets it grow:

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

    Source: Ziyin et al. (2024), section 3.
    """
    if isinstance(dynamics, torch.optim.Optimizer):
        require_settings(dynamics)
    if not isinstance(dynamics, Dynamics):
        raise SettingsError(
            f"expected SGD, AdamW, GradientDescent, GradientFlow, Langevin or NoetherFlow as dynamics, got {dynamics!r}"
        )
    if schedule is not None and not isinstance(dynamics, (Optimizer, GradientDescent)):
        raise SettingsError(
            f"a schedule scales the learning rate of SGD, AdamW or GradientDescent; {type(dynamics).__name__} has none"
        )
    at_steps = recorded_steps(steps, record)
    require_uncoupled(model)
    if isinstance(dynamics, Optimizer):
        _batch_size(dynamics)
        dynamics = dynamics.named_by(model)
    elif isinstance(dynamics, (Langevin, NoetherFlow)):
        dynamics = replace(dynamics, sgd=dynamics.sgd.named_by(model))
    generator = generator or torch.Generator().manual_seed(0)
    stacked = replicate(model, start, replicas, dtype)
    resolved = {name: symmetry.rename(aliases(model)) for name, symmetry in (symmetries or {}).items()}
    first = {name: stack[0] for name, stack in (stacked.moving | stacked.fixed).items()}
    for symmetry in resolved.values():
        symmetry.check(first)
    stream = _stream(dynamics, data, dtype, stacked.device)
    integrator = _integrator(dynamics, model, loss, stream, stacked, resolved, schedule, generator, dtype)
    recorder = Recorder(resolved, observables or {})
    with torch.no_grad(), _threads(_work(dynamics, stream, stacked.moving)):
        for step in track(range(steps), type(dynamics).__name__, shown=progress):
            if step in at_steps:
                recorder.add_state(step, integrator.params | stacked.fixed, integrator.second_moments)
                recorder.add_losses(integrator.advance_watched(step))
            else:
                integrator.advance(step)
        final, second_moments = integrator.params, integrator.second_moments
        recorder.add_state(steps, final | stacked.fixed, second_moments)
        # The last record needs the loss of one more step. A schedule may be undefined at that step.
        recorder.add_losses(integrator.advance_watched(steps - 1))
    return recorder.trajectory(final, second_moments)


def _batch_size(settings: SGD | AdamW) -> int:
    """The number of examples of a step; raises `SettingsError` if the settings do not name it."""
    if settings.batch_size is None:
        raise SettingsError(
            "a simulation draws minibatches, and nf.AdamW has no batch size here: give nf.AdamW(..., batch_size=...)"
        )
    return settings.batch_size


def _work(dynamics: Dynamics, stream: FiniteStream | OnlineStream, moving: Params) -> int:
    """Multiplications in a step, roughly: parameters of all replicas times examples."""
    examples = 1
    if isinstance(dynamics, Optimizer):
        examples = _batch_size(dynamics)
    elif isinstance(stream, FiniteStream):
        examples = stream.count
    return examples * sum(stack.numel() for stack in moving.values())


@contextlib.contextmanager
def _threads(work: int) -> Iterator[None]:
    """A block with one thread if a step has few multiplications.

    A second thread saves no time in a small step. If another program needs the core, every operation waits for that
    thread: a simulation took 35 times as long.
    """
    before = torch.get_num_threads()
    if work < _SMALL_STEP:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _stream(
    dynamics: Dynamics, data: Batch | Sampler, dtype: torch.dtype, device: torch.device
) -> FiniteStream | OnlineStream:
    """The source of examples that data and dynamics need; raises `SettingsError` if they do not fit together."""
    if not callable(data):
        independent = not isinstance(dynamics, Optimizer) or dynamics.replacement
        stream = FiniteStream(data, dtype, device, replacement=independent)
        if not independent and isinstance(dynamics, Optimizer) and _batch_size(dynamics) > stream.count:
            raise SettingsError(f"batch_size {dynamics.batch_size} exceeds the {stream.count} examples of the data set")
        return stream
    if not isinstance(dynamics, Optimizer):
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
    start: Replicas,
    symmetries: Mapping[str, Symmetry],
    schedule: Schedule | None,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> Integrator:
    """The integrator of the dynamics, at the start."""
    # Frozen parameters are equal for all replicas, so vmap needs no stack of them.
    fixed = {name: stack[0] for name, stack in start.fixed.items()}
    gradients = ReplicaGradients(model, loss, list(start.moving), fixed, stream.rebuild, dtype)
    if isinstance(dynamics, Optimizer):
        source = Minibatches(stream, start.count, _batch_size(dynamics), generator)
        if isinstance(dynamics, AdamW):
            return AdamWIntegrator(start.moving, gradients, dynamics, source, schedule)
        return by_steps(start.moving, gradients, dynamics, source, schedule)
    if not isinstance(stream, FiniteStream):
        raise EmptyDataError(f"{type(dynamics).__name__} needs a finite data set, got none")
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
    start: Replicas,
    symmetries: Mapping[str, Symmetry],
    stream: FiniteStream,
    dtype: torch.dtype,
) -> Integrator:
    """The Noether flow from the loss and the noise of every replica at the start."""
    batch = stream.rebuild(full.next())
    function = ModelFunction(model, loss, dtype)
    starts, means = [], []
    for replica in range(start.count):
        params = {name: stack[replica] for name, stack in start.moving.items()}
        means.append(function.losses(params, batch).mean().cpu())
        noise = flow.noise
        if noise is None:
            copied = _copy_at(model, params, dtype)
            noise = estimate_noise(copied, loss, [batch], symmetries, progress=False)
        starts.append(({name: tensor.to(CPU) for name, tensor in params.items()}, noise))
    return OrbitIntegrator(flow, symmetries, starts, torch.stack(means))


def _copy_at(model: nn.Module, params: Params, dtype: torch.dtype) -> nn.Module:
    """A copy of the model with the given parameters; parameters that are not given keep their values."""
    copied = copy_of(model, dtype)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if name in params:
                parameter.copy_(params[name])
    return copied
