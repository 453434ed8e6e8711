"""Ways of measuring gradient noise: ours, the plain ones, and those of other packages."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import noetherflow as nf
from noetherflow.noise.exact import Subject
from noetherflow.noise.layerwise import LayerwisePass

from .models import Built, one_by_one


def nothing() -> None:
    """What there is to do after a step that leaves nothing behind."""


# For which symmetries a meter measures.
Symmetries = Literal["none", "rescalings", "all"]


class Way(NamedTuple):
    """What is timed, what it found, and how to let go of that.

    Args:
        step: One step.
        trace: Tr Sigma, unbiased within the batch, from the last step.
        clear: Frees what the last step left behind; not timed.
        missing: What the last step did not find, in words.
    """

    step: Callable[[], object]
    trace: Callable[[], float]
    clear: Callable[[], None] = nothing
    missing: Callable[[], str] = str


def plain(built: Built) -> Way:
    def step() -> None:
        built.model.zero_grad()
        built.loss(built.model, built.batch).mean().backward()

    return Way(step, lambda: float("nan"))


def metered(built: Built, *, symmetries: Symmetries = "rescalings", variances: bool = False, train: bool = True) -> Way:
    found = {} if symmetries == "none" else symmetries_of(built, matrices=symmetries == "all")
    meter = nf.NoiseMeter(built.model, found, variances=variances)

    def step() -> None:
        built.model.zero_grad()
        with meter.step(built.batch, train=train):
            built.loss(built.model, built.batch).mean().backward()

    return Way(step, lambda: float(meter.noise.trace))


def estimate(built: Built) -> Way:
    """One batch of many: `estimate_noise` also checks the first one."""
    subject = Subject.of(built.model, built.loss, symmetries_of(built, matrices=False), None)
    layerwise = LayerwisePass(subject, variances=False, max_bytes=2**28)
    layerwise.check(built.batch, subject.losses_of(built.batch), random=False, where="the batch")
    # The same batch again and again changes no average.
    return Way(
        lambda: layerwise.add(built.batch, "the batch"), lambda: float(layerwise.moments().trace) * built.unbiased
    )


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
        squares = sum(squares_of(one) for one in stacks)
        return built.trace(squares, [one.sum(0) for one in stacks])

    return keeping(step)


def backpack(built: Built, *, extension: str) -> Way:
    from backpack import backpack as recording
    from backpack import extend, extensions

    field = {"BatchL2Grad": "batch_l2", "SumGradSquared": "sum_grad_squared", "Variance": "variance"}[extension]
    model = extend(copy.deepcopy(built.model))
    parameters = dict(model.named_parameters())

    def step() -> None:
        model.zero_grad()
        with recording(getattr(extensions, extension)()):
            built.loss(model, built.batch).mean().backward()

    def trace() -> float:
        # Of a mean over the batch: the gradient of an example is divided by the size of the batch.
        fields = [getattr(one, field) for one in parameters.values() if hasattr(one, field)]
        found = sum(float(one.double().sum()) for one in fields) * built.size**2
        if extension == "Variance":
            return found * built.unbiased
        return built.trace(found, [one.grad * built.size for one in parameters.values() if one.grad is not None])

    def clear() -> None:
        model.zero_grad()
        for one in parameters.values():
            if hasattr(one, field):
                delattr(one, field)

    def missing() -> str:
        without = {id(one) for one in parameters.values() if not hasattr(one, field)}
        kinds = {
            type(module).__name__
            for module in model.modules()
            if any(id(one) in without for one in module.parameters(recurse=False))
        }
        return f"{len(without)} of {len(parameters)} parameters, those of {', '.join(sorted(kinds))}, are left out"

    return Way(step, trace, clear, lambda: missing() if not all(hasattr(p, field) for p in parameters.values()) else "")


def opacus(built: Built, *, ghost: bool, told: bool = False) -> Way:
    from opacus import GradSampleModule
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    inner, loss = copy.deepcopy(built.model), built.told if told else built.loss
    assert loss is not None
    model: Any = (
        GradSampleModuleFastGradientClipping(inner, loss_reduction="mean", max_grad_norm=1.0, use_ghost_clipping=True)
        if ghost
        else GradSampleModule(inner, loss_reduction="mean")
    )
    parameters: dict[str, Any] = dict(inner.named_parameters())

    def step() -> None:
        model.zero_grad()
        loss(model, built.batch).mean().backward()

    def trace() -> float:
        if ghost:
            squares = float(model.get_norm_sample().double().square().sum())
        else:
            squares = sum(squares_of(one.grad_sample) for one in parameters.values())
        return built.trace(squares, [one.grad * built.size for one in parameters.values()])

    def missing() -> str:
        shapes = {} if ghost else {name: tuple(one.grad_sample.shape) for name, one in parameters.items()}
        other = [f"`{name}` has shape {shape}" for name, shape in shapes.items() if shape[0] != built.size]
        return f"of {built.size} examples, `grad_sample` of {', '.join(other)}" if other else ""

    return Way(step, trace, model.zero_grad, missing)


def squares_of(stack: Tensor) -> float:
    """The sum of all squares. By example: over all at once, float32 loses digits. No second stack is made."""
    return float(torch.linalg.vector_norm(stack.flatten(1), dim=1).double().square().sum())


def keeping(step: Callable[[], float]) -> Way:
    """A step that returns what it found."""
    found = [float("nan")]

    def kept() -> None:
        found[0] = step()

    return Way(kept, lambda: found[0])


# Finding them takes far longer than a step, and they are the same for every way.
FOUND: dict[nn.Module, dict[str, nf.Symmetry]] = {}


def symmetries_of(built: Built, *, matrices: bool) -> dict[str, nf.Symmetry]:
    if built.model not in FOUND:
        FOUND[built.model] = dict(nf.find_symmetries(built.model, built.loss, built.batch))
    found = FOUND[built.model]
    return {name: one for name, one in found.items() if matrices or not isinstance(one, nf.MatrixSymmetry)}


OURS: dict[str, Callable[[Built], Way]] = {
    "while training": metered,
    "with Grams": partial(metered, symmetries="all"),
    "with variances": partial(metered, variances=True),
    "measure only": partial(metered, train=False),
    "measure only, norms": partial(metered, symmetries="none", train=False),
    "estimate_noise": estimate,
}
RIVALS: dict[str, Callable[[Built], Way]] = {
    "BackPACK BatchL2Grad": lambda built: backpack(built, extension="BatchL2Grad"),
    "BackPACK SumGradSquared": lambda built: backpack(built, extension="SumGradSquared"),
    "BackPACK Variance": lambda built: backpack(built, extension="Variance"),
    "Opacus hooks": lambda built: opacus(built, ghost=False),
    "Opacus hooks, position ids given": lambda built: opacus(built, ghost=False, told=True),
    "Opacus ghost": lambda built: opacus(built, ghost=True),
    "torch.func": vectorised,
    "nf, exact=True": exact,
    "loop": loop,
}


def ways_for(built: Built) -> dict[str, Callable[[Built], Way]]:
    """Those that differ for this model."""
    known = OURS | RIVALS
    return {name: way for name, way in known.items() if built.told is not None or "position ids" not in name}
