"""A move is taken back to the last bit, and an interruption leaves nothing half moved."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import checks
import noetherflow as nf
from cases import Case, case
from same import require_same

SGD = nf.SGD(0.1, 5, 0.02)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "no momentum": lambda params: torch.optim.SGD(params, lr=0.01),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True),
}


class Interrupted(TorchFunctionMode):
    """A block in which the n-th `copy_` raises, as Ctrl-C may do; every later one too if the user is impatient."""

    def __init__(self, at: int, *, until: int | None = None) -> None:
        super().__init__()
        self.at, self.until = at, at if until is None else until
        self.calls = 0

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") == "copy_":
            self.calls += 1
            if self.at <= self.calls <= self.until:
                raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


def train(one: Case, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        one.loss(one.model, one.batch).mean().backward()
        optimizer.step()


def started(kind: str, name: str = "diagonal", steps: int = 2) -> tuple[Case, torch.optim.Optimizer, nf.Equilibrium]:
    """A model in the middle of its training, and its equilibrium."""
    one = case(name)
    optimizer = OPTIMIZERS[kind](one.model.parameters())
    train(one, optimizer, steps)
    return one, optimizer, nf.solve_equilibrium(checks.noise_of(one), SGD, one.model)


def bits_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return copy.deepcopy((dict(model.state_dict()), optimizer.state_dict()["state"]))


@pytest.mark.parametrize("between", [0, 3])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_undo_restores_every_bit_whatever_training_did(kind: str, steps: int, between: int) -> None:
    one, optimizer, equilibrium = started(kind, steps=steps)
    before = bits_of(one.model, optimizer)
    tensors = [id(entry) for state in optimizer.state.values() for entry in state.values()]
    moved = nf.rebalance_(one.model, equilibrium, one.loss, one.batch, optimizer=optimizer)
    train(one, optimizer, between)
    with pytest.raises(AssertionError):
        require_same(bits_of(one.model, optimizer), before)
    moved()
    require_same(bits_of(one.model, optimizer), before)
    assert [id(entry) for state in optimizer.state.values() for entry in state.values()] == tensors
    train(one, optimizer, 1)
    later = bits_of(one.model, optimizer)
    moved()
    require_same(bits_of(one.model, optimizer), later)


def test_an_undone_model_trains_on_as_if_it_had_not_moved() -> None:
    (one, optimizer, equilibrium), (twin, other, _) = (started("AdamW") for _ in range(2))
    with nf.rebalance_(one.model, equilibrium, one.loss, one.batch, optimizer=optimizer):
        train(one, optimizer, 2)
    train(one, optimizer, 2)
    train(twin, other, 2)
    require_same(bits_of(one.model, optimizer), bits_of(twin.model, other))


def test_a_checkpoint_that_was_loaded_in_between_is_replaced_too() -> None:
    one, optimizer, equilibrium = started("AdamW")
    before = bits_of(one.model, optimizer)
    moved = nf.rebalance_(one.model, equilibrium, one.loss, one.batch, optimizer=optimizer)
    train(one, optimizer, 1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    moved()
    require_same(bits_of(one.model, optimizer), before)


def test_a_state_that_was_started_afresh_comes_back() -> None:
    one, optimizer, equilibrium = started("AdamW", "matrix")
    before = bits_of(one.model, optimizer)
    with pytest.warns(UserWarning, match="starts afresh"):
        moved = nf.rebalance_(one.model, equilibrium, one.loss, one.batch, optimizer=optimizer, second_moments="reset")
    assert len(optimizer.state) == 1  # that of the last bias, which does not move
    train(one, optimizer, 1)
    moved()
    require_same(bits_of(one.model, optimizer), before)


def test_a_block_ends_with_the_model_as_it_was() -> None:
    one, optimizer, equilibrium = started("momentum")
    before = bits_of(one.model, optimizer)
    with nf.rebalance_(one.model, equilibrium, one.loss, one.batch, optimizer=optimizer) as moved:
        assert "change=" in repr(moved)
        assert "undone" not in repr(moved)
        torch.testing.assert_close(dict(one.model.named_parameters()), equilibrium.params)
    assert "undone" in repr(moved)
    require_same(bits_of(one.model, optimizer), before)
    with (
        pytest.raises(ZeroDivisionError),
        nf.rebalance_(one.model, equilibrium, one.loss, one.batch, optimizer=optimizer),
    ):
        1 / 0  # noqa: B018
    require_same(bits_of(one.model, optimizer), before)


def test_without_the_optimizer_its_state_stays() -> None:
    one, optimizer, equilibrium = started("momentum")
    state = bits_of(one.model, optimizer)[1]
    moved = nf.rebalance_(one.model, equilibrium, one.loss, one.batch)
    require_same(bits_of(one.model, optimizer)[1], state)
    train(one, optimizer, 1)
    state = bits_of(one.model, optimizer)[1]
    moved()
    require_same(bits_of(one.model, optimizer)[1], state)


def writes(kind: str, **more: Any) -> int:
    """How often a move calls `copy_`."""
    one, optimizer, equilibrium = started(kind)
    with Interrupted(at=0) as counter:
        nf.rebalance_(one.model, equilibrium, one.loss, one.batch, optimizer=optimizer, **more)
    return counter.calls


@pytest.mark.parametrize(("kind", "least"), [("momentum", 6), ("AdamW", 12)])
@pytest.mark.parametrize("impatient", [0, 2])
def test_an_interruption_at_any_write_leaves_nothing_half_moved(kind: str, least: int, impatient: int) -> None:
    """Three parameters move, with a momentum each or three averages each; the restoration may be interrupted too."""
    count = writes(kind)
    assert count >= least
    one, optimizer, equilibrium = started(kind)
    before = bits_of(one.model, optimizer)
    for at in range(1, count + 1):
        until = at if not impatient else at + 1
        with pytest.raises(KeyboardInterrupt), Interrupted(at, until=until):
            nf.rebalance_(one.model, equilibrium, one.loss, one.batch, optimizer=optimizer)
        require_same(bits_of(one.model, optimizer), before)
    nf.rebalance_(one.model, equilibrium, one.loss, one.batch, optimizer=optimizer)


def test_an_interruption_of_the_undo_is_repaired() -> None:
    one, optimizer, equilibrium = started("AdamW")
    before = bits_of(one.model, optimizer)
    moved = nf.rebalance_(one.model, equilibrium, one.loss, one.batch, optimizer=optimizer)
    with pytest.raises(KeyboardInterrupt), Interrupted(at=5):
        moved()
    require_same(bits_of(one.model, optimizer), before)
    moved = nf.rebalance_(one.model, equilibrium, one.loss, one.batch, optimizer=optimizer)
    with pytest.raises(KeyboardInterrupt), Interrupted(at=5, until=100):
        moved()
    moved()  # an undo that was interrupted again and again can be repeated
    require_same(bits_of(one.model, optimizer), before)


def test_a_warning_that_is_an_error_leaves_everything_as_it_was() -> None:
    one, optimizer, equilibrium = started("AdamW", "matrix")
    before = bits_of(one.model, optimizer)
    with pytest.raises(UserWarning, match="estimates"):  # pytest makes warnings errors
        nf.rebalance_(one.model, equilibrium, one.loss, one.batch, optimizer=optimizer)
    require_same(bits_of(one.model, optimizer), before)
