"""Two linear layers: F3, and F4's problem."""

import math
from typing import Any

import torch
from torch import Tensor

import noetherflow as nf
from holds.case import SEEDS, case
from noetherflow.linear import TwoLayer, two_layer_equilibrium, two_layer_sharpness
from noetherflow.paper import f3_data_covariance as f3
from noetherflow.paper import f3_theory, linear_pair
from noetherflow.paper import f4_warmup as f4
from noetherflow.paper.linear_pair import LinearPair
from noetherflow.simulation import GradientDescent, simulate

# The label noise of F3, and the variances of its inputs.
LABEL_NOISE, PHIS = 6.0, (0.2, 1.0, 5.0)
# F4's problem: the learning rate, the steps, and the distance along the orbit from which a run starts.
F4_LR, F4_STEPS, F4_DISTANCE = 5e-4, 220_000, 0.9
# Gradient descent before SGD: a step of F4's warmup, which leaves much to learn, and a step that ends at a minimum.
DESCENTS = {"unfinished": (1e-3, 20_000), "finished": (1e-2, 100_000)}
# Steps at which F3 is recorded: evenly in the logarithm.
RECORDED = sorted({round(10 * 1.15**k) for k in range(60)})
Batches = list[tuple[Tensor, Tensor]]


def sample(inputs: int, outputs: int, seed: int) -> Batches:
    """Batches of a linear problem, other ones for every seed."""
    first, second = linear_pair.standard_normal(inputs, outputs)(3000, torch.Generator().manual_seed(100 + seed))
    return list(zip(first.split(150), second.split(150), strict=True))


def linear_forecast(params: dict[str, Tensor], replica: int, settings: nf.SGD, seed: int) -> nf.Forecast:
    """The forecast of a replica of a simulation of two linear layers."""
    (outputs, hidden), inputs = params["u"].shape[1:], params["w"].shape[2]
    model = LinearPair(inputs, hidden, outputs)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(params[name][replica])
            tensor.requires_grad_(name in {"u", "w"})
    batches = sample(inputs, outputs, seed)
    return nf.forecast(model, linear_pair.loss, batches, settings, linear_pair.ROTATION, progress=False, vectors=16)


def of_f3() -> list[dict[str, Any]]:
    """F3: SGD from the end of gradient descent; at every record gradient descent removes what fluctuates."""
    config = f3_theory.Config(phis=PHIS, label_noises=(LABEL_NOISE,), replicas=SEEDS)
    common: dict[str, Any] = {"model": LinearPair(config.width, config.hidden, config.width), "loss": linear_pair.loss}
    quiet = common | {"data": linear_pair.population(config.width, config.width), "dynamics": GradientDescent(1.0)}
    start = f3._start(config, 0.0, torch.Generator().manual_seed(config.seed))
    at = simulate(steps=config.descent_steps, start=start, record=config.descent_steps, **quiet).params
    settings = nf.SGD(1.0, config.batch_size)
    trained = simulate(
        data=linear_pair.standard_normal(config.width, config.width),
        dynamics=settings,
        steps=config.steps,
        start=at,
        generator=torch.Generator().manual_seed(3),
        observables={"u": lambda p: p["u"], "w": lambda p: p["w"]},
        record=[step for step in RECORDED if step < config.steps],
        **common,
    )
    seen, count = len(trained.steps), len(PHIS) * SEEDS
    noisy = {name: trained.observables[name].flatten(0, 1) for name in ("u", "w")}
    fixed = {n: t.repeat(seen, *(1 for _ in t.shape[1:])) for n, t in at.items() if n not in noisy}
    cooled = simulate(
        steps=config.cool_steps,
        start=noisy | fixed,
        observables={"sharpness": f3._sharpness},
        record=config.cool_steps,
        **quiet,
    ).observables["sharpness"]
    plain, calm = (values.reshape(seen, len(PHIS), SEEDS) for values in cooled)
    results = []
    for index, phi in enumerate(PHIS):
        replicas = range(index * SEEDS, (index + 1) * SEEDS)
        forecasts = [linear_forecast(at, replica, settings, replica % SEEDS) for replica in replicas]
        curves, unit = calm[:, index], float(at["rate"][index * SEEDS])
        result = case(f"F3, phi = {phi:g}", trained.steps, curves, curves[-1], forecasts, lr=settings.lr, unit=unit)
        results.append(result | {"fluctuating": plain[-12:, index].mean(0).tolist()})
    assert count == len(at["rate"])
    return results


def of_f4() -> list[dict[str, Any]]:
    """F4's problem, from a point of the orbit of the equilibrium, and from the end of gradient descent."""
    config = f4.Config(inits=SEEDS)
    world = config.world()
    common: dict[str, Any] = {"model": LinearPair(config.inputs, 1, config.outputs), "loss": linear_pair.loss}
    rest = two_layer_equilibrium(world.target, world.input_cov, world.noise_cov, 1)
    factor = math.exp(F4_DISTANCE)
    moved = linear_pair.replicated([(world, TwoLayer(rest.u * factor, rest.w / factor))] * SEEDS)
    population = linear_pair.population(config.inputs, config.outputs)
    kaiming = f4._starts(config, f4._kaiming, torch.Generator().manual_seed(config.seed))
    starts = {f"F4's problem, x = {F4_DISTANCE:g}": moved}
    for name, (lr, steps) in DESCENTS.items():
        learnt = simulate(data=population, dynamics=GradientDescent(lr), steps=steps, start=kaiming, **common)
        starts[f"F4 from Kaiming, {name} GD"] = learnt.params
    settings = nf.SGD(F4_LR, 1)
    results = []
    for name, start in starts.items():
        trained = simulate(
            data=linear_pair.standard_normal(config.inputs, config.outputs),
            dynamics=settings,
            steps=F4_STEPS,
            start=start,
            generator=torch.Generator().manual_seed(2),
            observables={"s": lambda p: two_layer_sharpness(linear_pair.weights_of(p), world.input_cov)},
            record=50,
            **common,
        )
        curves = trained.observables["s"]
        ends = curves[-len(curves) // 3 :].mean(0)
        forecasts = [linear_forecast(start, seed, settings, seed) for seed in range(SEEDS)]
        results.append(case(name, trained.steps, curves, ends, forecasts, lr=settings.lr))
    return results
