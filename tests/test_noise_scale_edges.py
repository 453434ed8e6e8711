"""The noise scale where a model, an optimizer or a state is not what the first examples show."""

import gc
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf


def words(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rare tokens, 4 a text, and what is to be told of each text."""
    tokens = torch.multinomial(1 / torch.arange(1, 301.0), 4 * 16, replacement=True, generator=generator).view(16, 4)
    return tokens, torch.randn(16, 1, generator=generator, dtype=torch.float64)


def test_entries_without_an_earlier_gradient_have_no_part_in_the_metric() -> None:
    """Epsilon alone would multiply the squares of the first gradient of a token by 1e8."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(300, 3), nn.Flatten(), nn.Linear(12, 1)).double()
    model.register_module("unused", nn.Linear(2, 2).double())
    named = {name: p for name, p in model.named_parameters() if "unused" not in name}
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch = nf.NoiseScale(model, optimizer=optimizer, every=1, window=math.inf)
    generator, pairs, fresh = torch.Generator().manual_seed(0), [], 0
    for _ in range(5):
        x, y = words(generator)
        losses = (model(x) - y).square().sum(1)
        rows = [torch.autograd.grad(each, list(named.values()), retain_graph=True) for each in losses]
        trace = square = 0.0
        for index, parameter in enumerate(named.values()):
            each = torch.stack([row[index] for row in rows])
            state = optimizer.state.get(parameter)
            root = torch.zeros_like(parameter)
            if state:
                root = (state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))).sqrt()
            metric = torch.where(root > 0, 1 / (root + 1e-8), 0.0)
            fresh += int(((root == 0) & each.any(0)).sum()) if state else 0
            scatter = float((metric * (each - each.mean(0)).square()).sum()) / 15
            trace, square = trace + scatter, square + float((metric * each.mean(0).square()).sum()) - scatter / 16
        pairs.append((trace, square))
        optimizer.zero_grad()
        with watch.step(x):
            (model(x) - y).square().sum(1).mean().backward()
        optimizer.step()
    estimate = watch.preconditioned
    assert estimate is not None
    assert fresh > 20
    assert estimate.trace == pytest.approx(sum(each for each, _ in pairs[1:]) / 4, rel=1e-9)
    assert estimate.norm_sq == pytest.approx(sum(each for _, each in pairs[1:]) / 4, rel=1e-9)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def measure(watch: nf.NoiseScale, model: nn.Module, count: int = 1) -> None:
    for _ in range(count):
        x = torch.randn(8, 4, dtype=torch.float64)
        with watch.step(x):
            model(x).square().mean().backward()


@pytest.mark.parametrize("between", ["examples", "microbatches"])
def test_parameters_that_are_trained_later_are_a_sentence(between: str) -> None:
    model = net()
    model[0].requires_grad_(False)
    watch = nf.NoiseScale(model, between=between, every=1)
    model[0].requires_grad_(True)
    with pytest.raises(nf.SettingsError, match=r"0\.weight.*another NoiseScale"), watch.step(torch.ones(8, 4)):
        pass


def test_the_optimizer_in_a_wrapper_is_the_optimizer() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer
            self.param_groups = optimizer.param_groups

    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    watch = nf.NoiseScale(model, optimizer=Wrapper(optimizer), every=1)
    measure(watch, model)
    optimizer.step()
    measure(watch, model)
    assert watch.preconditioned is not None


@pytest.mark.parametrize("state", [{}, None, {"0.weight": torch.ones(1)}, {"steps": 1, "skipped": 0, "averages": {}}])
def test_another_state_is_a_sentence(state: Any) -> None:
    with pytest.raises(nf.SettingsError, match="state"):
        nf.NoiseScale(net()).load_state_dict(state)


def test_several_optimizers_are_a_sentence() -> None:
    model = net()
    with pytest.raises(nf.SettingsError, match="adaptive"):
        nf.NoiseScale(model, optimizer=[torch.optim.SGD(model.parameters())])  # type: ignore[arg-type]


@pytest.mark.parametrize("between", ["examples", "microbatches"])
def test_nothing_as_large_as_the_model_is_kept_between_steps(between: str) -> None:
    model = nn.Linear(256, 300).double()
    optimizer = torch.optim.AdamW(model.parameters())
    watch = nf.NoiseScale(model, optimizer=optimizer, between=between, every=1)
    gc.collect()
    before = [each for each in gc.get_objects() if type(each) is Tensor]  # of other tests of this process
    for _ in range(2):
        x = torch.randn(4, 256, dtype=torch.float64)
        with watch.step(x) as done:  # a loop keeps `done` until the next step
            for part in x.split(2):
                (model(part).square().mean() / 2).backward() if between == "microbatches" else None
                done(size=2, weight=0.5)
            model(x).square().mean().backward() if between == "examples" else None
        optimizer.step()
    optimizer.zero_grad()
    del x, part
    gc.collect()
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
    known = {id(tensor) for tensor in (*before, *model.parameters(), *moments)}
    tensors = [each for each in gc.get_objects() if type(each) is Tensor and each.numel() >= 256 * 300]
    assert not [tuple(each.shape) for each in tensors if id(each) not in known]


def test_parameter_groups_and_layers_have_names_of_their_number() -> None:
    """Two groups of a name, and a layer that is called like a group."""
    model = net()
    model.add_module("group x", nn.Linear(1, 1).double())
    named = dict(model.named_parameters())
    members = [[named["0.weight"]], [named["0.bias"], named["2.weight"]], [named["2.bias"], *model[3].parameters()]]
    optimizer = torch.optim.SGD([{"params": each, "name": "x"} for each in members], lr=0.1)
    watch = nf.NoiseScale(model, optimizer=optimizer, every=1)
    measure(watch, model)
    assert list(watch.groups) == ["group x (0)", "group x (1)", "group x (2)"]
    assert watch.layers.keys() == {"0", "2", "group x"}
    for parts in (watch.groups, watch.layers):
        assert sum(each.trace for each in parts.values()) == pytest.approx(watch.estimate.trace)
    metrics = watch.metrics()
    assert sum(name.startswith("noise/scale/") for name in metrics) == 6


def test_a_compiled_run_is_resumed_without_compiling() -> None:
    model = net()
    compiled: Any = torch.compile(model, backend="eager")
    watch = nf.NoiseScale(compiled, every=1)
    measure(watch, compiled, 2)
    plain = nf.NoiseScale(model, every=1)
    plain.load_state_dict(watch.state_dict())
    assert plain.layers.keys() == {"0", "2"}
    assert plain.metrics() == watch.metrics()
