"""The account of the charges in training loops: skipped steps, checkpoints, wrappers, and what is refused."""

import io
import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from charge_oracles import backward, batches, loss, network, symmetries
from test_charge_ledger import along_axes, measured_step, summed


def sgd(model: nn.Module, **settings: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **({"lr": 0.01, "weight_decay": 0.02} | settings))


def train(account: nf.ChargeLedger, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for batch in batches(steps):
        backward(model, batch)
        with account.step():
            optimizer.step()


def charges(model: nn.Module, given: dict[str, nf.Symmetry]) -> dict[str, Tensor]:
    theta = {name: p.detach().double() for name, p in model.named_parameters()}
    return {name: symmetry.charge(theta) for name, symmetry in given.items()}


@pytest.mark.parametrize("every", [1, 4])
def test_what_happens_between_split_steps_is_accounted_for(every: int) -> None:
    model = network()
    optimizer = sgd(model)
    start = charges(model, symmetries())
    account = nf.ChargeLedger(model, symmetries(), optimizer, every=every)
    due = []
    for batch in batches(10):
        due.append(account.due)
        backward(model, batch)
        with account.step():
            optimizer.step()
        for name, now in charges(model, symmetries()).items():
            parts = account.totals[name]
            torch.testing.assert_close(parts.change, now - start[name], rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(summed(parts), parts.change, rtol=1e-11, atol=1e-14)
    assert due == [step % every == 0 for step in range(10)]
    assert account.split_steps == sum(due)
    assert account.steps == 10
    assert all(bool(parts.between.any()) == (every > 1) for parts in account.totals.values())
    with torch.no_grad():
        model[1].weight.mul_(2.0)  # whatever moves the parameters outside of the blocks
    assert all(parts.between.abs().max() > 1e-3 for parts in account.totals.values())


def test_nothing_is_computed_between_split_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = sgd(model)
    account = nf.ChargeLedger(model, symmetries(), optimizer, every=3)
    calls = []
    monkeypatch.setattr(nf.MatrixSymmetry, "grams", lambda *_: calls.append(1))
    account.steps = 1
    with account.step():
        optimizer.step()
    assert not calls
    assert account.steps == 2


def test_an_exception_in_the_block_leaves_the_account_as_it_was() -> None:
    model, given = network(), along_axes()
    optimizer, meter = sgd(model), nf.NoiseMeter(model, given)
    account = nf.ChargeLedger(model, given, optimizer, meter=meter)
    measured_step(account, meter, model, optimizer, next(batches(1)))
    before = account.state_dict()
    batch = next(batches(1))
    with meter.step(batch):
        loss(model, batch).mean().backward()
    with pytest.raises(KeyboardInterrupt), account.step():
        raise KeyboardInterrupt
    torch.testing.assert_close(account.state_dict(), before, rtol=0, atol=0)
    # The gradients that were measured for the step which failed say nothing of the next step.
    train(account, model, optimizer, 1)
    assert account.measured_steps == 1
    assert all(parts.kick.any() for parts in account.totals.values())
    measured_step(account, meter, model, optimizer, batch)
    assert account.measured_steps == 2


def test_a_step_that_makes_nan_is_refused_and_not_accounted_for() -> None:
    model = network()
    account = nf.ChargeLedger(model, symmetries(), sgd(model))
    before = account.state_dict()
    with pytest.raises(nf.NonFiniteError, match=r"after the step, the parameter '1\.weight'"), account.step():
        model[1].weight.data[0, 0] = torch.nan
    torch.testing.assert_close(account.state_dict(), before, rtol=0, atol=0)


def test_a_step_that_a_scaler_skips_is_counted() -> None:
    model = network().float()
    optimizer = sgd(model)
    account = nf.ChargeLedger(model, symmetries(), optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step, (x, y) in enumerate(batches(4)):
        optimizer.zero_grad()
        scaler.scale(loss(model, (x.float(), y.float())).mean()).backward()
        if step == 1:
            model[0].weight.grad[0, 0] = torch.inf
        with account.step():
            scaler.step(optimizer)
        scaler.update()
        assert bool(account.last["scaling"].change.any()) == (step != 1)
        assert bool(account.last["scaling"].decay.any()) == (step != 1)
    assert (account.steps, account.split_steps, account.skipped) == (4, 4, 1)


def test_noise_needs_a_single_measurement_of_the_step() -> None:
    model, given = network(), along_axes()
    optimizer, meter = sgd(model), nf.NoiseMeter(model, given)
    account = nf.ChargeLedger(model, symmetries(), optimizer, meter=meter)
    for measured in ([True], [True, False], [True, True], [False]):
        optimizer.zero_grad()
        for batch, inside in zip(batches(2), measured, strict=False):
            with meter.step(batch) if inside else nullcontext():
                loss(model, batch).mean().backward()
        with account.step():
            optimizer.step()
    # Only in the first step: then half of the gradient, two gradients and no gradient were measured.
    assert account.measured_steps == 1
    assert all(parts.kick.any() for parts in account.totals.values())


def test_a_symmetry_that_is_not_measured_keeps_its_kick() -> None:
    model = network()
    measured = {name: symmetry for name, symmetry in symmetries().items() if name == "1 -> 3"}
    optimizer, meter = sgd(model), nf.NoiseMeter(model, measured)
    account = nf.ChargeLedger(model, symmetries(), optimizer, meter=meter)
    measured_step(account, meter, model, optimizer, next(batches(1)))
    # Sums by row and column give the sum of all, so the scaling of complete tensors is measured too.
    told = {name for name, parts in account.last.items() if parts.noise.any()}
    assert told == {"1 -> 3", "scaling"}
    for name, parts in account.last.items():
        assert parts.kick.any() == (name not in told)
        assert parts.mean.any() == (name in told)


def test_a_parameter_that_the_meter_left_out_has_no_noise_of_zero() -> None:
    class Twisted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x @ w.mT

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            return g @ w, g.mT @ x

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 5).double(), nn.Linear(5, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return Twisted.apply(self.first(x).relu(), self.last.weight) + self.last.bias

    model = Net()
    given: dict[str, nf.Symmetry] = {
        "hidden": nf.DiagonalSymmetry(
            [nf.Axis("first.weight", 0), nf.Axis("first.bias", 0)], [nf.Axis("last.weight", 1)]
        )
    }
    given["first"] = nf.ScalarSymmetry(nf.Axis("first.weight", 0))
    optimizer, meter = sgd(model), nf.NoiseMeter(model, given)
    account = nf.ChargeLedger(model, given, optimizer, meter=meter)
    measured_step(account, meter, model, optimizer, next(batches(1)))
    assert meter.unmeasured
    assert account.last["hidden"].kick.any()
    assert not account.last["hidden"].noise.any()
    assert account.last["first"].noise.any()  # whose parameters were measured


def test_a_checkpoint_continues_as_if_nothing_had_happened() -> None:
    def loop(steps: range, account: nf.ChargeLedger, meter: nf.NoiseMeter, model: nn.Module, optimizer: Any) -> None:
        for batch in itertools.islice(batches(steps.stop), steps.start, None):
            measured_step(account, meter, model, optimizer, batch)

    def fresh() -> tuple[Any, ...]:
        model, given = network(), along_axes()
        optimizer, meter = sgd(model, momentum=0.5), nf.NoiseMeter(model, given)
        return nf.ChargeLedger(model, given, optimizer, every=2, meter=meter), meter, model, optimizer

    uninterrupted = fresh()
    loop(range(9), *uninterrupted)
    before, after = fresh(), fresh()
    loop(range(5), *before)
    buffer = io.BytesIO()
    torch.save([before[0].state_dict(), before[2].state_dict(), before[3].state_dict()], buffer)
    buffer.seek(0)
    for target, state in zip((after[0], after[2], after[3]), torch.load(buffer, weights_only=True), strict=True):
        target.load_state_dict(state)
    loop(range(5, 9), *after)
    torch.testing.assert_close(after[0].state_dict(), uninterrupted[0].state_dict(), rtol=0, atol=0)
    assert after[0].metrics() == uninterrupted[0].metrics()


def test_states_that_do_not_fit_are_refused() -> None:
    model = network()
    account = nf.ChargeLedger(model, symmetries(), sgd(model))
    train(account, model, sgd(model), 1)
    state = account.state_dict()
    other = nf.ChargeLedger(model, along_axes(), sgd(model))
    with pytest.raises(nf.SettingsError, match=r"load it into an account of the symmetries with which it was saved"):
        other.load_state_dict(state)
    with pytest.raises(nf.SettingsError, match="format 1, got 2"):
        account.load_state_dict(state | {"format": 2})
    with pytest.raises(nf.SettingsError, match="damaged"):
        account.load_state_dict({key: value for key, value in state.items() if key != "totals"})
    torch.testing.assert_close(account.state_dict(), state, rtol=0, atol=0)


def test_the_table_and_the_metrics() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    account = nf.ChargeLedger(model, symmetries(), optimizer)
    train(account, model, optimizer, 3)
    text = str(account)
    assert "Charges after 3 steps: 3 split, 0 with noise, 0 skipped" in text
    assert text.splitlines()[1].split() == ["symmetry", "charge", "change", "kick", "broken"]
    assert "The weight decay of Adam passes through its preconditioner" in " ".join(text.split())
    assert "<table>" in account._repr_html_()
    metrics = account.metrics()
    assert all(type(value) is float for value in metrics.values())
    gram = charges(model, symmetries())["0 -> 1"]
    assert metrics["charge/0 -> 1"] == pytest.approx(float(gram.trace()), rel=1e-12)
    assert metrics["charge_broken/1 -> 3"] == pytest.approx(float(account.totals["1 -> 3"].broken.sum()), rel=1e-12)
    account.reset()
    assert account.steps == 0
    assert not any(parts.change.any() for parts in account.totals.values())


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_drift_predicts_the_change_of_small_steps(momentum: float) -> None:
    """Many steps of SGD from a minimum of the mean loss: the mean gradient is small, and the noise is not."""
    model, given, data = network(), along_axes(), next(batches(1, 60))
    settings = nf.SGD(lr=0.002, batch_size=6, weight_decay=0.02, momentum=momentum)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model, data).mean() + 0.01 * sum(p.square().sum() for p in model.parameters())
        value.backward()
        return value

    optimizer.step(closure)
    optimizer = sgd(model, lr=0.002, momentum=momentum)
    account = nf.ChargeLedger(model, given, optimizer)
    noise = nf.estimate_noise(model, loss, [data], given)
    with pytest.raises(nf.SettingsError, match="nothing to compare after 0 steps"):
        account.compare(noise, settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(400):
        chosen = torch.randint(60, (6,), generator=generator)
        backward(model, tuple(part[chosen] for part in data))
        with account.step():
            optimizer.step()
    for measured, predicted in account.compare(noise, settings).values():
        assert (measured - predicted).norm() < 0.2 * predicted.norm()
        assert (measured - 2 * predicted).norm() > 0.5 * predicted.norm()
    # Momentum makes kicks of gradients of earlier steps: of all kicks, those of a step with itself have this share.
    parts = account.totals["scaling"]
    share = float(parts.kick / (parts.kick + parts.broken))
    assert share == pytest.approx((1 - momentum) / (1 + momentum), rel=0.15)
    for wrong in (nf.AdamW(lr=1e-3), nf.SGD(lr={"0.weight": 0.1}, batch_size=6)):
        with pytest.raises(nf.SettingsError, match="only under SGD with a single learning rate"):
            account.compare(noise, wrong)
