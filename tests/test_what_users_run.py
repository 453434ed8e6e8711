"""What users run, in every way of measuring noise: right, right but for what is named, or refused in a sentence."""

import gc
import inspect
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import noetherflow as nf
from noise_ways import (
    EXACT,
    METERS,
    REFUSED,
    RIGHT,
    TRAIN,
    WAYS,
    Meter,
    Row,
    assert_gradients,
    gradients,
    mean_step,
    outcome,
)
from users_models import Net, by_token, classified, numbers, squared, text, words
from what_users_run import ROWS, outcomes

# What fails today: ways and reason by row. A test that passes although it waits fails, so that its entry is deleted.
FORMED = "the gradient is not autograd's: it is formed again, and rounded otherwise"
LOST = "a term that was not seen is lost from .grad, and .grad changes if the step only measures"
NOISELESS = "a use that was not seen counts as noiseless, and .grad changes"
DERIVED = "derivatives inside the loss: an error of PyTorch, and wrong numbers in a step that only measures"
GATHERED = "tokens that an index or a mask gathers are refused"
GUESSED = "the axis of the examples is guessed from sizes"
COMPARED = "a meter does not compare with single examples"
ALL_OR_NOTHING = "a single parameter that is not measured stops the meter"


def cases() -> list[Any]:
    """Every row in every way."""
    return [pytest.param(name, way, id=f"{name}-{way}") for name in ROWS for way in WAYS]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "way"), cases())
def test_what_users_run(name: str, way: str) -> None:
    assert outcome(ROWS[name], way) in ROWS[name].allowed(way)


# The checks of the table can fail


def scaled(factor: float, hidden: str) -> Any:
    """A step in which the gradient of a parameter is multiplied on its way, which the loop does not see."""

    def step(model: nn.Module, loss: nf.Loss, batch: Any, meter: Meter, train: bool) -> None:
        mean_step(model, loss, batch, meter, train)
        if type(meter) is nf.NoiseMeter and train:
            dict(model.named_parameters())[hidden].grad.mul_(factor)

    return step


def test_a_gradient_that_a_meter_changes_is_noticed() -> None:
    row = Row(ROWS["plain"].build, squared, numbers(), scaled(1 + 1e-6, "b.weight"))
    with pytest.raises(AssertionError, match=r"\.grad of b\.weight is off"):
        outcome(row, TRAIN)
    assert outcome(Row(ROWS["plain"].build, squared, numbers(), scaled(1.0, "b.weight")), TRAIN) == RIGHT


@pytest.mark.parametrize("way", WAYS)
def test_noise_of_another_loss_is_noticed(way: str) -> None:
    def other(model: nn.Module, batch: Any) -> Tensor:
        return squared(model, batch) * (1 + 1e-5)

    with pytest.raises(AssertionError):
        outcome(Row(ROWS["plain"].build, squared, numbers(), exact_loss=other), way)


def test_a_number_for_coupled_examples_is_noticed() -> None:
    row = Row(ROWS["plain"].build, squared, numbers(), expected=outcomes(WAYS, REFUSED))
    for way in (EXACT, *METERS):
        with pytest.raises(AssertionError, match="what does not exist"):
            outcome(row, way)


# Nothing is left behind


class Interrupt(KeyboardInterrupt):
    """What a user sends at any moment."""


# An interrupt inside of PyTorch's bookkeeping of modes leaves a mode behind without any meter, too.
PLUMBING = ("contextlib.py", "overrides.py", "_python_dispatch.py", "weakref.py")


@contextmanager
def interrupted(at: int) -> Iterator[list[int]]:
    """A block in which the n-th call of a Python function raises; yields a list with the number of calls."""
    calls = [0]

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        # Python drops an exception that is raised where it closes a generator or deletes an object.
        dropped = code.co_flags & inspect.CO_GENERATOR or code.co_name in {"__exit__", "__del__"}
        if event == "call" and not dropped and not code.co_filename.endswith(PLUMBING):
            calls[0] += 1
            if calls[0] == at:
                raise Interrupt

    before = sys.gettrace()
    gc.disable()  # callbacks of the collector are no part of a step
    sys.settrace(trace)
    try:
        yield calls
    finally:
        sys.settrace(before)
        gc.enable()


def attributes(model: nn.Module) -> dict[str, Any]:
    """The attributes and hooks of modules and parameters, as far as Python sees them."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            hooks = isinstance(value, dict) and "hooks" in key
            seen[f"{name}|{key}"] = len(value) if hooks else id(value) if isinstance(value, Tensor) else None
    for name, parameter in model.named_parameters():
        seen[f"{name}|class"] = type(parameter)
        seen[f"{name}|memory"] = parameter.data_ptr()
        seen[f"{name}|attributes"] = sorted(vars(parameter))
        hooks = parameter._backward_hooks
        seen[f"{name}|hooks"] = len(hooks) if hooks else 0
        seen[f"{name}|later hooks"] = len(parameter._post_accumulate_grad_hooks or {})
    return seen


def moments(count: int) -> list[float]:
    """Moments of a step, as shares of its events, evenly spread but for a fixed jitter."""
    jitter = torch.rand(count, generator=torch.Generator().manual_seed(1))
    return [(index + float(offset)) / count for index, offset in enumerate(jitter)]


def stopped_step(model: nn.Module, batch: Any, meter: Meter, train: bool, at: int) -> int:
    """A step whose forward and backward pass are interrupted at a call, 0 for none; returns the number of calls."""
    with meter.step(batch, train=train), interrupted(at) as calls:
        classified(model, batch).mean().backward()
    return calls[0]


@pytest.mark.parametrize("train", [True, False], ids=METERS)
def test_nothing_is_left_behind(train: bool) -> None:
    """30 interrupts in forward and backward passes: no hook, mode or attribute stays, and the next step is right."""
    model, batch = text(by_token)(), words()()[0]
    rows = {"rows": nf.DiagonalSymmetry(plus=[nf.Axis("b.weight", 0)])}
    meter, expected = (nf.NoiseMeter(model, rows, variances=True) for _ in range(2))
    before = attributes(model)
    stopped_step(model, batch, expected, train, 0)  # imports and allocates
    count = stopped_step(model, batch, expected, train, 0)
    assert count > 50
    model.zero_grad()
    classified(model, batch).mean().backward()
    plain = gradients(model)
    for number, share in enumerate(moments(30)):
        model.zero_grad()
        with pytest.raises(Interrupt):
            stopped_step(model, batch, meter, train, 1 + int(share * (count - 1)))
        assert attributes(model) == before, f"interrupted after {share:.2f} of a step"
        assert not _get_current_function_mode_stack()
        assert not _get_current_dispatch_mode_stack()
        assert not any(vars(tensor) for tensor in batch)
        model.zero_grad()
        mean_step(model, classified, batch, meter, train)
        if train:
            assert_gradients(gradients(model), plain)
        assert meter.noise.count == (1 + number) * len(batch[0])
        torch.testing.assert_close(meter.noise.trace, expected.noise.trace, rtol=1e-12, atol=0)
        torch.testing.assert_close(meter.noise.grams, expected.noise.grams, rtol=1e-11, atol=1e-15)
    assert all(parameter.grad is None for parameter in model.parameters()) == (not train)
    seen = weakref.ref(model)
    del model, meter, expected
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("what", ["hook of a module", "hook of a parameter", "attribute", "tensor in a module"])
def test_what_is_left_behind_is_noticed(what: str) -> None:
    model = Net().double()
    before = attributes(model)
    assert attributes(model) == before
    if what == "hook of a module":
        model.b.register_forward_pre_hook(lambda module, inputs: None)
    elif what == "hook of a parameter":
        model.b.weight.register_hook(lambda gradient: gradient)
    elif what == "attribute":
        model.b.weight.seen = True
    else:
        model.b.weight.data = model.b.weight.data.clone()
    assert attributes(model) != before


@pytest.mark.parametrize("where", ["forward", "loss", "backward"])
@pytest.mark.parametrize("train", [True, False], ids=METERS)
def test_an_error_of_the_user_comes_through(where: str, train: bool) -> None:
    """An exception in a step reaches the user as it is, and the next step is right."""

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, d: Tensor) -> Tensor:
            raise ZeroDivisionError

    failing = False

    def middle(net: Any, h: Tensor) -> Tensor:
        if failing and where == "forward":
            raise ZeroDivisionError
        return Failing.apply(net.b(h)) if failing and where == "backward" else net.b(h)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        losses = squared(model, batch)
        if failing and where == "loss":
            raise ZeroDivisionError
        return losses

    model, batch = Net(middle).double(), numbers()()[0]
    meter = nf.NoiseMeter(model, {})
    mean_step(model, loss, batch, meter, train)
    trace, before = meter.noise.trace, attributes(model)
    failing = True
    with pytest.raises(ZeroDivisionError):
        mean_step(model, loss, batch, meter, train)
    failing = False
    assert attributes(model) == before
    assert not _get_current_function_mode_stack()
    mean_step(model, loss, batch, meter, train)
    torch.testing.assert_close(meter.noise.trace, trace, rtol=1e-12, atol=0)
