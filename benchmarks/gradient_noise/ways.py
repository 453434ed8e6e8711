"""Ways of measuring gradient noise: ours, the plain ones, and those of other packages.

Each is a pair of functions: one step, which is timed, and Tr Sigma (unbiased within the batch) from the last step.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import noetherflow as nf
from noetherflow.noise.exact import Subject
from noetherflow.noise.fast import FastPass

from .models import Built, one_by_one


class Way(NamedTuple):
    """What is timed, and what it found."""

    step: Callable[[], object]
    trace: Callable[[], float]


def plain(built: Built) -> Way:
    def step() -> None:
        built.model.zero_grad()
        built.loss(built.model, built.batch).mean().backward()

    return Way(step, lambda: float("nan"))


def training(built: Built, *, matrices: bool = False, variances: bool = False) -> Way:
    meter = nf.NoiseMeter(built.model, symmetries_of(built, matrices=matrices), variances=variances)

    def step() -> None:
        built.model.zero_grad()
        with meter.step(built.batch):
            built.loss(built.model, built.batch).mean().backward()

    return Way(step, lambda: float(meter.noise.trace))


def measuring(built: Built) -> Way:
    """One batch of many: `estimate_noise` also checks the first one."""
    subject = Subject.of(built.model, built.loss, symmetries_of(built, matrices=False), None)
    quick = FastPass(subject, variances=False, max_bytes=2**28)
    quick.check(built.batch, subject.losses_of(built.batch), random=False, where="the batch")
    # The same batch again and again: it changes no average.
    return Way(lambda: quick.add(built.batch, "the batch"), lambda: float(quick.moments().trace) * built.unbiased)


def loop(built: Built) -> Way:
    return keeping(lambda: one_by_one(built))


def exact(built: Built) -> Way:
    def step() -> float:
        noise = nf.estimate_noise(built.model, built.loss, [built.batch], {}, exact=True, max_bytes=2**31)
        return float(noise.trace) * built.unbiased

    return keeping(step)


def vectorised(built: Built) -> Way:
    params = {name: one.detach() for name, one in built.model.named_parameters()}
    batch = built.batch if isinstance(built.batch, tuple) else (built.batch,)

    class Call(nn.Module):
        def forward(self, *parts: Tensor) -> Tensor:
            whole = tuple(part[None] for part in parts)
            return built.loss(built.model, whole if len(whole) > 1 else whole[0]).sum()

    call = Call()
    call.model = built.model

    def one(params: dict[str, Tensor], *parts: Tensor) -> Tensor:
        return functional_call(call, {f"model.{name}": value for name, value in params.items()}, parts)

    gradients = vmap(grad(one), in_dims=(None, *(0 for _ in batch)), randomness="different")

    def step() -> float:
        stacks = gradients(params, *batch).values()
        return built.trace(sum(float(one.square().sum()) for one in stacks), [one.sum(0) for one in stacks])

    return keeping(step)


def backpack(built: Built, *, extension: str) -> Way:
    from backpack import backpack as recording
    from backpack import extend, extensions

    field = {"BatchL2Grad": "batch_l2", "SumGradSquared": "sum_grad_squared", "Variance": "variance"}[extension]
    model = extend(copy.deepcopy(built.model))
    entropy = extend(nn.CrossEntropyLoss())
    parameters = dict(model.named_parameters())

    def loss() -> Tensor:
        if isinstance(built.batch, tuple):
            return entropy(model(built.batch[0]), built.batch[1])
        return built.loss(model, built.batch).mean()

    def step() -> None:
        model.zero_grad()
        with recording(getattr(extensions, extension)()):
            loss().backward()

    def trace() -> float:
        missing = [name for name, one in parameters.items() if not hasattr(one, field)]
        if missing:
            raise AttributeError(f"no {field} for {len(missing)} of {len(parameters)} parameters, such as {missing[0]}")
        found = sum(float(getattr(one, field).double().sum()) for one in parameters.values()) * built.size**2
        if extension == "Variance":
            return found * built.unbiased
        return built.trace(found, [one.grad * built.size for one in parameters.values() if one.grad is not None])

    return Way(step, trace)


def opacus(built: Built, *, ghost: bool) -> Way:
    from opacus import GradSampleModule
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    inner = copy.deepcopy(built.model)
    model = (
        GradSampleModuleFastGradientClipping(inner, loss_reduction="mean", max_grad_norm=1.0, use_ghost_clipping=True)
        if ghost
        else GradSampleModule(inner, loss_reduction="mean")
    )
    parameters = list(inner.parameters())

    def step() -> None:
        model.zero_grad()
        built.loss(model, built.batch).mean().backward()

    def trace() -> float:
        if ghost:
            squares = float(model.get_norm_sample().double().square().sum())
        else:
            squares = sum(float(one.grad_sample.double().square().sum()) for one in parameters)
        return built.trace(squares, [one.grad * built.size for one in parameters])

    return Way(step, trace)


def keeping(step: Callable[[], float]) -> Way:
    """A step that returns what it found."""
    found = [float("nan")]

    def kept() -> None:
        found[0] = step()

    return Way(kept, lambda: found[0])


def symmetries_of(built: Built, *, matrices: bool) -> dict[str, nf.Symmetry]:
    found = nf.find_symmetries(built.model, built.loss, built.batch)
    return {name: one for name, one in found.items() if matrices or not isinstance(one, nf.MatrixSymmetry)}


OURS: dict[str, Callable[[Built], Way]] = {
    "while training": training,
    "with Grams": lambda built: training(built, matrices=True),
    "with variances": lambda built: training(built, variances=True),
    "measure only": measuring,
}
RIVALS: dict[str, Callable[[Built], Way]] = {
    "BackPACK BatchL2Grad": lambda built: backpack(built, extension="BatchL2Grad"),
    "BackPACK SumGradSquared": lambda built: backpack(built, extension="SumGradSquared"),
    "BackPACK Variance": lambda built: backpack(built, extension="Variance"),
    "Opacus hooks": lambda built: opacus(built, ghost=False),
    "Opacus ghost": lambda built: opacus(built, ghost=True),
    "torch.func": vectorised,
    "nf, exact=True": exact,
    "loop": loop,
}
