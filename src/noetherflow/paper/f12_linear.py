"""F12: two linear layers, from the minimum of F3, and on F4's problem."""

import math
from typing import Any

import torch
from torch import Tensor

from noetherflow.forecasting import Forecast, forecast
from noetherflow.linear import TwoLayer, two_layer_equilibrium, two_layer_sharpness
from noetherflow.optimizers import SGD
from noetherflow.paper import f3_data_covariance as f3
from noetherflow.paper import f3_theory, linear_pair
from noetherflow.paper import f4_warmup as f4
from noetherflow.paper.f12_measured import Measured
from noetherflow.paper.f12_settings import Config
from noetherflow.paper.linear_pair import LinearPair
from noetherflow.simulation import GradientDescent, simulate

# Gradient descent before SGD on F4's problem: a step of F4's warmup, which leaves much to learn, and a step that ends
# at a minimum.
DESCENTS = {"unfinished": (1e-3, 20_000), "finished": (1e-2, 100_000)}
# Steps at which F3 is recorded: evenly in the logarithm.
RECORDED = sorted({round(10 * 1.15**k) for k in range(75)})
# The learning rate of further runs, over that of F3.
SLOW = 0.25
# Examples that a forecast sees, and those of a batch.
_EXAMPLES, _BATCH = 3000, 150


def of_f3(config: Config) -> list[Measured]:
    """F3, at its learning rate and at a quarter of it."""
    return _f3(config, config.f3_phis, 1.0) + (_f3(config, config.f3_slow, SLOW) if config.f3_slow else [])


def _f3(config: Config, phis: tuple[float, ...], lr: float) -> list[Measured]:
    """SGD from the end of gradient descent; at every record gradient descent removes what fluctuates.

    Args:
        config: The settings.
        phis: Variances of the inputs that matter.
        lr: The learning rate over that of F3, which is a factor of the loss of each replica.

    Returns:
        A problem for each phi.
    """
    theory = f3_theory.Config(phis=phis, label_noises=(config.f3_label_noise,), replicas=config.seeds)
    common: dict[str, Any] = {"model": LinearPair(theory.width, theory.hidden, theory.width), "loss": linear_pair.loss}
    quiet = common | {"data": linear_pair.population(theory.width, theory.width), "dynamics": GradientDescent(1.0)}
    start = f3.small_start(theory, 0.0, torch.Generator().manual_seed(config.seed))
    at = simulate(steps=theory.descent_steps, start=start, record=theory.descent_steps, **quiet).params
    steps = round(config.f3_steps / lr)
    settings = SGD(lr, theory.batch_size)
    trained = simulate(
        data=linear_pair.standard_normal(theory.width, theory.width),
        dynamics=settings,
        steps=steps,
        start=at,
        generator=torch.Generator().manual_seed(config.seed + 3),
        observables={"u": lambda p: p["u"], "w": lambda p: p["w"]},
        record=[step for step in RECORDED if step < steps],
        **common,
    )
    seen = len(trained.steps)
    noisy = {name: trained.observables[name].flatten(0, 1) for name in ("u", "w")}
    fixed = {n: t.repeat(seen, *(1 for _ in t.shape[1:])) for n, t in at.items() if n not in noisy}
    cooled = simulate(
        steps=theory.cool_steps,
        start=noisy | fixed,
        observables={"sharpness": f3.sharpness_of},
        record=theory.cool_steps,
        **quiet,
    ).observables["sharpness"]
    calm = cooled[-1].reshape(seen, len(phis), config.seeds)
    results = []
    for index, phi in enumerate(phis):
        first = index * config.seeds
        forecasts = [forecast_of(config, at, first + seed, settings, seed) for seed in range(config.seeds)]
        curves, unit = calm[:, index], float(at["rate"][first])
        name = f"F3, phi = {phi:g}" if lr == 1 else f"F3, phi = {phi:g}, lr x {lr:g}"
        results.append(Measured.of(name, trained.steps, curves, curves[-1], forecasts, lr=lr, unit=unit))
    return results


def of_f4(config: Config) -> list[Measured]:
    """F4's problem, from a point of the orbit of the equilibrium, and from the end of gradient descent."""
    theory = f4.Config(inits=config.seeds)
    world = theory.world()
    common: dict[str, Any] = {"model": LinearPair(theory.inputs, 1, theory.outputs), "loss": linear_pair.loss}
    starts = _f4_starts(config, theory, common)
    settings = SGD(config.f4_lr, 1)
    trained = simulate(
        data=linear_pair.standard_normal(theory.inputs, theory.outputs),
        dynamics=settings,
        steps=config.f4_steps,
        start={name: torch.cat([start[name] for start in starts.values()]) for name in next(iter(starts.values()))},
        generator=torch.Generator().manual_seed(config.seed + 2),
        observables={"sharpness": lambda p: two_layer_sharpness(linear_pair.weights_of(p), world.input_cov)},
        record=50,
        **common,
    )
    results = []
    for (name, start), curves in zip(
        starts.items(), trained.observables["sharpness"].split(config.seeds, dim=1), strict=True
    ):
        forecasts = [forecast_of(config, start, seed, settings, seed) for seed in range(config.seeds)]
        ends = curves[-len(curves) // 3 :].mean(0)
        results.append(Measured.of(name, trained.steps, curves, ends, forecasts, lr=config.f4_lr))
    return results


def _f4_starts(config: Config, theory: f4.Config, common: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The parameters of all replicas at each start, by the name of the problem."""
    world, starts = theory.world(), {}
    if "orbit" in config.f4_starts:
        rest = two_layer_equilibrium(world.target, world.input_cov, world.noise_cov, 1)
        factor = math.exp(config.f4_distance)
        moved = linear_pair.replicated([(world, TwoLayer(rest.u * factor, rest.w / factor))] * config.seeds)
        starts[f"F4, x = {config.f4_distance:g}"] = moved
    kaiming = f4.starts_of(theory, f4.kaiming_scale, torch.Generator().manual_seed(config.seed))
    population = linear_pair.population(theory.inputs, theory.outputs)
    for name, (lr, steps) in DESCENTS.items():
        if name in config.f4_starts:
            learnt = simulate(data=population, dynamics=GradientDescent(lr), steps=steps, start=kaiming, **common)
            starts[f"F4 from Kaiming, {name} GD"] = learnt.params
    return starts


def forecast_of(config: Config, params: dict[str, Tensor], replica: int, settings: SGD, seed: int) -> Forecast:
    """The forecast of a replica of a simulation of two linear layers, from examples of the seed."""
    (outputs, hidden), inputs = params["u"].shape[1:], params["w"].shape[2]
    model = LinearPair(inputs, hidden, outputs)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(params[name][replica])
            tensor.requires_grad_(name in {"u", "w"})
    generator = torch.Generator().manual_seed(100 * (config.seed + 1) + seed)
    first, second = linear_pair.standard_normal(inputs, outputs)(_EXAMPLES, generator)
    batches = list(zip(first.split(_BATCH), second.split(_BATCH), strict=True))
    rotation, vectors = linear_pair.ROTATION, config.vectors
    return forecast(model, linear_pair.loss, batches, settings, rotation, progress=False, vectors=vectors)
