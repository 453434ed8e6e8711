"""Models and optimizers that `ChargeLedger` accepts, and what it refuses."""

import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import noetherflow as nf
from charge_oracles import Lion, backward, batches, loss, network, symmetries
from test_charge_account import charges, sgd, train
from test_charge_ledger import along_axes, measured_step, summed
from toy_symmetry import toy_of


def test_a_closure_and_learning_rates_as_tensors() -> None:
    model, batch = network(), next(batches(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.01), weight_decay=0.02)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    meter = nf.NoiseMeter(model, along_axes())
    account = nf.ChargeLedger(model, along_axes(), optimizer, meter=meter)
    for _ in range(3):

        def closure() -> Tensor:
            optimizer.zero_grad()
            with meter.step(batch):
                value = loss(model, batch).mean()
                value.backward()
            return value

        with account.step():
            optimizer.step(closure)
        scheduler.step()
        assert all(parts.broken.abs().max() < 1e-14 < parts.noise.abs().max() for parts in account.last.values())
        assert account.last["scaling"].decay.any()
    assert account.measured_steps == 3


def test_names_of_wrappers_tied_weights_and_frozen_parts() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False).double()
            self.b = nn.Linear(3, 3, bias=False).double()
            self.c = nn.Linear(3, 2).double()
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)))

    inner = Tied()
    model = nn.ModuleDict({"module": inner})
    optimizer = torch.optim.SGD([inner.a.weight], lr=0.01)
    given = {"pair": nf.MatrixSymmetry([nf.Axis("b.weight", 0)], [nf.Axis("c.weight", 1)])}
    account = nf.ChargeLedger(model, given, optimizer)
    assert account.symmetries["pair"].names == ("module.a.weight", "module.c.weight")
    inner.c.requires_grad_(False)
    start = inner.c.weight.mT @ inner.c.weight
    backward(inner, next(batches(1)))
    with account.step():
        optimizer.step()
    now = inner.a.weight @ inner.a.weight.mT - inner.c.weight.mT @ inner.c.weight
    torch.testing.assert_close(account.charges["pair"], now.detach(), rtol=1e-14, atol=1e-15)
    assert torch.equal(start, inner.c.weight.mT @ inner.c.weight)
    torch.testing.assert_close(summed(account.last["pair"]), account.last["pair"].change, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_in_other_precision_are_accounted_for_in_float64(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    optimizer = sgd(model)
    account = nf.ChargeLedger(model, symmetries(), optimizer)
    start = charges(model, symmetries())
    for x, y in batches(20):
        backward(model, (x.to(dtype), y.to(dtype)))
        with account.step():
            optimizer.step()
    for name, now in charges(model, symmetries()).items():
        parts = account.totals[name]
        assert parts.change.dtype == torch.float64
        for value in (parts.change, summed(parts)):
            torch.testing.assert_close(value, now - start[name], rtol=1e-12, atol=1e-14)
        # What is left of the optimizer's own breaking is the rounding of the parameters.
        assert parts.broken.abs().max() < 100 * torch.finfo(dtype).eps


def test_symmetries_of_a_user() -> None:
    model = network()
    toy = toy_of()("1.weight", 1.0)
    toy.rename = lambda names: toy
    scaling = nf.ScalarSymmetry(nf.Axis("1.weight", 0))
    optimizer = sgd(model)
    account = nf.ChargeLedger(model, {"toy": toy, "scaling": scaling}, optimizer)
    train(account, model, optimizer, 3)
    for (name, mine), (_, theirs) in zip(account.totals["toy"].items(), account.totals["scaling"].items(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, msg=name)


@dataclasses.dataclass(frozen=True)
class Odd(nf.AxisSymmetry):
    """A scaling whose Gram is another function of the rows."""

    power: float = 2.0
    python: bool = False
    action, per_row = nf.Action.SCALES_ENTRIES, False

    def dimension(self, v: Any) -> int:
        return 1

    def identity(self, v: Any) -> Tensor:
        return v[self.names[0]].new_zeros(())

    def reduce(self, rows: Tensor) -> Tensor:
        return rows.sum((-2, -1))

    def gram(self, rows: Tensor) -> Tensor:
        total = self.reduce(rows.abs() ** self.power)
        return torch.tensor(total.item(), dtype=torch.float64) if self.python else total

    def multiply(self, x: Tensor, rows: Tensor) -> Tensor:
        return x * rows

    def exponential(self, x: Tensor) -> Tensor:
        return x.exp()


def test_charges_that_are_no_quadratic_form_are_refused() -> None:
    model = network()
    axis = nf.Axis("1.weight", 0)
    nf.ChargeLedger(model, {"odd": Odd(axis)}, sgd(model))
    with pytest.raises(nf.NotASymmetryError, match=r"'odd' .Odd. is no quadratic form"):
        nf.ChargeLedger(model, {"odd": Odd(axis, power=3.0)}, sgd(model))
    with pytest.raises(nf.NotASymmetryError, match="cannot be differentiated"):
        nf.ChargeLedger(model, {"odd": Odd(axis, python=True)}, sgd(model))


def test_optimizers_and_settings_that_are_refused() -> None:
    model = network()

    def make(optimizer: Any, **options: Any) -> nf.ChargeLedger:
        return nf.ChargeLedger(model, options.pop("symmetries", symmetries()), optimizer, **options)

    with pytest.raises(nf.SettingsError, match=r'Lion applies weight_decay=0\.1: give decay="decoupled"'):
        make(Lion(model.parameters(), lr=0.01, weight_decay=0.1))
    make(Lion(model.parameters(), lr=0.01))
    assert "Lion" in str(make(Lion(model.parameters(), lr=0.01, weight_decay=0.1), decay="coupled"))
    with pytest.raises(nf.SettingsError, match='decay must be "decoupled", "coupled" or None, got'):
        make(sgd(model), decay="adamw")
    for every in (0, 1.5, "5"):
        with pytest.raises(nf.SettingsError, match="every must be a whole number"):
            make(sgd(model), every=every)
    with pytest.raises(nf.SettingsError, match=r"watch\.meter"):
        make(sgd(model), meter=nf.NoiseScale(model))
    with pytest.raises(nf.SettingsError, match="none given"):
        make(None)
    with pytest.raises(nf.SettingsError, match=r"SGD\) holds none of the 4 parameters"):
        make(sgd(network()))
    with pytest.raises(nf.SettingsError, match="at least one symmetry"):
        make(sgd(model), symmetries={})
    with pytest.raises(nf.ParameterNameError, match=r"5\.weight"):
        make(sgd(model), symmetries={"far": nf.ScalarSymmetry(nf.Axis("5.weight", 0))})
    with pytest.raises(nf.SettingsError, match="never ends"):
        make(sgd(model, momentum=1.0))
    complicated = nn.Linear(2, 2, dtype=torch.complex128)
    with pytest.raises(nf.SettingsError, match="complex parameters"):
        nf.ChargeLedger(complicated, {"w": nf.ScalarSymmetry(nf.Axis("weight", 0))}, sgd(complicated))


def test_parameters_that_fsdp_shards_are_gathered() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain, sharded = network(), network()
        fully_shard(sharded, mesh=dist.init_device_mesh("cpu", (1,)))
        accounts = []
        for model in (plain, sharded):
            optimizer = sgd(model, momentum=0.5)
            accounts.append(nf.ChargeLedger(model, symmetries(), optimizer))
            train(accounts[-1], model, optimizer, 3)
        assert hasattr(sharded[0].weight, "full_tensor")
        torch.testing.assert_close(accounts[1].state_dict(), accounts[0].state_dict(), rtol=1e-12, atol=1e-15)
    finally:
        dist.destroy_process_group()


class Wrapper(torch.optim.Optimizer):
    """What Accelerate and Lightning give in place of an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups


def test_an_optimizer_in_a_wrapper_and_a_meter_of_the_model_in_a_wrapper() -> None:
    noise, decay = [], []
    for wrapped in (False, True):
        inner = network()
        model = nn.ModuleDict({"module": inner}) if wrapped else inner
        optimizer = torch.optim.AdamW(inner.parameters(), lr=0.01, weight_decay=0.1)
        meter = nf.NoiseMeter(inner, along_axes())
        account = nf.ChargeLedger(model, along_axes(), Wrapper(optimizer) if wrapped else optimizer, meter=meter)
        measured_step(account, meter, inner, optimizer, next(batches(1)))
        noise.append({name: parts.noise for name, parts in account.last.items()})
        decay.append({name: parts.decay for name, parts in account.last.items()})
    torch.testing.assert_close(noise[1], noise[0], rtol=0, atol=0)
    torch.testing.assert_close(decay[1], decay[0], rtol=0, atol=0)
    assert all(parts.any() for part in (noise, decay) for parts in part[1].values())


def test_a_meter_of_another_model_is_refused_and_the_account_stays_as_it_was() -> None:
    model, other = network(), nn.Sequential(nn.Linear(3, 2)).double()
    optimizer, meter = sgd(model), nf.NoiseMeter(other, {})
    account = nf.ChargeLedger(model, along_axes(), optimizer, meter=meter)
    batch = next(batches(1))
    with meter.step(batch):
        loss(other, batch).mean().backward()
    before = account.state_dict()
    backward(model, next(batches(1)))
    with pytest.raises(nf.ParameterNameError, match=r"the meter names \['0\.bias'\]"), account.step():
        optimizer.step()
    torch.testing.assert_close(account.state_dict(), before, rtol=0, atol=0)


def test_measurements_that_are_not_used_are_not_kept() -> None:
    """Under accumulation in several blocks each has the squares of all entries."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    watch = nf.NoiseScale(model, optimizer=optimizer, every=1)
    seen: list[weakref.ref[Any]] = []
    account = nf.ChargeLedger(model, symmetries(), optimizer, meter=watch.meter)
    watch.meter.observers.append(lambda step: seen.append(weakref.ref(step)))
    x = torch.randn(8, model[0].in_features, dtype=torch.float64)
    for count in (1, 0, 0):
        with watch.step(x):
            model(x).square().mean().backward()
        gc.collect()
        assert sum(reference() is not None for reference in seen) == count
    with account.step():
        optimizer.step()
    assert account.measured_steps == 0
