"""NoiseCallback under Lightning's Trainer: the figures of a plain loop, and training that does not notice."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from lightning_runs import QUIET, Loop, Regression, fit, half, network, pairs
from noetherflow.integrations.lightning import NoiseCallback

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]
EXACT, ROUGH = 1e-12, 1e-6


def equal(found: nf.NoiseScale | None, expected: nf.NoiseScale, close: float) -> None:
    """Compare everything that two watches say."""
    assert found is not None
    left, right = found.metrics(), expected.metrics()
    assert left.keys() == right.keys()
    assert len(left) > 8
    assert (found.steps, found.skipped) == (expected.steps, expected.skipped)
    assert found.estimate.steps == expected.estimate.steps > 1
    assert list(left.values()) == pytest.approx(list(right.values()), rel=close)


def lora(net: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    return get_peft_model(net, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))  # type: ignore[arg-type]


LOOPS: dict[str, tuple[Loop, dict[str, Any]]] = {
    "plain": (Loop(), {}),
    "every batch": (Loop(every=1), {}),
    "accumulated": (Loop(k=3), {"accumulate_grad_batches": 3}),
    "clipped": (Loop(k=2, clip=0.01), {"accumulate_grad_batches": 2, "gradient_clip_val": 0.01}),
    "microbatches": (Loop(k=2, between="microbatches"), {"accumulate_grad_batches": 2}),
    "microbatches, clipped": (
        Loop(k=3, every=1, between="microbatches", clip=0.01),
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.01},
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_the_figures_of_a_plain_loop(name: str) -> None:
    loop, settings = LOOPS[name]
    module, alike = Regression(network()), Regression(network())
    callback = NoiseCallback(every=loop.every, between=loop.between)
    fit(module, [callback], **settings)
    equal(callback.watch, loop.run(alike), EXACT)
    for parameter, other in zip(module.parameters(), alike.parameters(), strict=True):
        assert torch.allclose(parameter, other, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("between", ["examples", "microbatches"])
def test_mixed_precision(k: int, between: str) -> None:
    if between == "microbatches" and k == 1:
        return
    batches = pairs(torch.float32)
    loop = Loop(k=k, every=1, between=between, autocast=torch.bfloat16)
    callback = NoiseCallback(every=1, between=between)
    fit(Regression(network().float()), [callback], batches, precision="bf16-mixed", accumulate_grad_batches=k)
    equal(callback.watch, loop.run(Regression(network().float()), batches=batches), ROUGH)


@pytest.mark.parametrize("scale", [2.0**8, 2.0**20])
@pytest.mark.parametrize(("k", "between"), [(1, "examples"), (2, "examples"), (2, "microbatches")])
def test_the_factor_of_a_gradient_scaler_is_taken_out_and_steps_that_overflow_are_counted(
    k: int, between: str, scale: float
) -> None:
    batches = pairs(torch.float32)
    plugin = half(scale)
    scaler = half(scale).scaler
    loop = Loop(k=k, every=1, between=between, clip=0.5, autocast=torch.float16, scaler=scaler, epochs=4)
    callback = NoiseCallback(every=1, between=between)
    settings = {"plugins": [plugin], "accumulate_grad_batches": k, "gradient_clip_val": 0.5, "epochs": 4}
    fit(Regression(network().float()), [callback], batches, **settings)
    expected = loop.run(Regression(network().float()), batches=batches)
    equal(callback.watch, expected, ROUGH)
    assert (expected.skipped > 0) == (scale > 2.0**10)


def test_adapters() -> None:
    callback = NoiseCallback(every=2)
    fit(Regression(lora(network())), [callback])
    expected = Loop().run(Regression(lora(network())))
    equal(callback.watch, expected, EXACT)
    assert any("lora_A" in layer for layer in expected.layers)


@pytest.mark.parametrize("between", ["examples", "microbatches"])
@pytest.mark.parametrize("complete", [False, True])
def test_a_compiled_module(between: str, complete: bool) -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    callback = NoiseCallback(every=2, between=between)
    if complete:
        module = torch.compile(Regression(network()), backend=backend)
    else:
        module = Regression(torch.compile(network(), backend=backend))  # type: ignore[arg-type]
    fit(module, [callback], accumulate_grad_batches=2)  # type: ignore[arg-type]
    expected = Loop(k=2, between=between).run(Regression(network()))
    assert callback.watch is not None
    # Without the layers: in their names, the compiled network is net._orig_mod.
    assert callback.watch.metrics(layers=False) == pytest.approx(expected.metrics(layers=False), rel=EXACT)
    assert compiled  # steps that are not measured run what was compiled


def test_batches_by_name_and_inputs() -> None:
    named = [{"weights": torch.ones(9, 9), "x": x, "y": y} for x, y in pairs()]
    callback = NoiseCallback(every=2, inputs=lambda batch: batch["x"])
    fit(Regression(network()), [callback], named)
    expected = Loop().run(Regression(network()))
    equal(callback.watch, expected, EXACT)
    short = [{"x": x, "y": y} for x, y in pairs()]
    callback = NoiseCallback(every=2)
    fit(Regression(network()), [callback], short)
    equal(callback.watch, expected, EXACT)


@pytest.mark.parametrize(("k", "between"), [(1, "examples"), (3, "examples"), (3, "microbatches")])
def test_a_sum_of_losses(k: int, between: str) -> None:
    def run(reduction: str, said: str) -> nf.NoiseScale | None:
        # Adam divides by the size of gradients, SGD with lr = 0 moves nothing: both losses see the same parameters.
        module = Regression(network(), reduction=reduction, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
        callback = NoiseCallback(every=1, between=between, reduction=said)
        fit(module, [callback], pairs()[:6], accumulate_grad_batches=k)
        return callback.watch

    mean, total, mistaken = run("mean", "mean"), run("sum", "sum"), run("sum", "mean")
    assert mean is not None
    assert mistaken is not None
    equal(total, mean, EXACT)
    assert mistaken.estimate.trace > 10 * mean.estimate.trace


@pytest.mark.parametrize("k", [1, 3])
def test_the_trace_is_that_of_the_gradients_of_single_examples(k: int) -> None:
    batches = pairs()
    module = Regression(network(), optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    callback = NoiseCallback(every=1, window=float("inf"))
    fit(module, [callback], batches, epochs=1, accumulate_grad_batches=k, gradient_clip_val=1e-3)
    traces = []
    for x, y in batches:
        rows = []
        for example in range(len(x)):
            loss = module.loss((x[example : example + 1], y[example : example + 1]))
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]))
        traces.append(float(torch.stack(rows).var(0).sum()))
    assert callback.watch is not None
    assert callback.watch.estimate.trace == pytest.approx(sum(traces) / len(traces), rel=EXACT)
