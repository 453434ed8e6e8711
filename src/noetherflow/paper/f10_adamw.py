r"""F10: where AdamW rests along a symmetry: the second moments of gradients decide, by their square roots.

Question: SGD brings the charge of a symmetry to the noise equilibrium. Where does AdamW bring it?

Setting: (a) a rank-one regression $u\,(w \cdot x)$ with n inputs and m outputs, online; (b) the regression with weight
decay, and ReLU networks of three hidden layers; (c) a scale-invariant loss; (d) the regression with settings at which
the theory stops to hold.

Formula: with frozen step sizes $p = \eta / \sqrt v$ the charge $C = \sum_i q_i \theta_i^2 / p_i$ of a diagonal
generator becomes $C' = (1 - \eta\lambda)^2 C + \sum_i q_i p_i g_i^2$ exactly, since the gradient of every example is
orthogonal to the orbit. With $v = E\,g_S^2$ it rests where $\sum_i q_i \sqrt{v_i}\,(\eta - 2\lambda\theta_i^2) = 0$.

(a) At the minimum $\sqrt{v_w} \propto |u|$ and $\sqrt{v_u} \propto |w|$ for isotropic inputs and noise. Without decay
$n |u| = m |w|$, so that $|w|^2 / |u|^2 = (n/m)^2$, where SGD has n/m. The coordinate is
$x = \tfrac14 \log(|w|^2 / |u|^2)$: w is scaled by $e^x$, u by $e^{-x}$.
(b) With decay $\eta\,(n / |w| - m / |u|) = 2\lambda\,(|w| - |u|)$. Under a large decay |w| and |u| become equal, and to
first order in their difference $|w|^2 - |u|^2 = \eta (n - m) / \lambda$. Equal v of all entries would give half of it:
the difference of $\sqrt{v_w}$ and $\sqrt{v_u}$, times $2\lambda\theta^2$, is as large as the noise terms.
(c) For a scale-invariant weight of c entries with equal v, $|\theta|^2 = \eta c / (2\lambda)$: neither the size of the
gradients nor the batch size enters.

Limits (d), measured: v has to be an average over many steps, and has to follow the relaxation, in about
$1 / (1 - \beta_2)$ steps; the learning rate has to be small enough for the loss to stay at its minimum; a mean gradient
that a large decay keeps up enters v, so that v has to be measured rather than predicted from the label noise. `eps` is
not in the formula, and the gradient of a penalty in v does not scale along the orbit: their predictions take the second
moments of the new point after each move, with the force of the noise that eps leaves. For networks, what a prediction
on the way is off is what training still changes in the function and in v.

Falsified by: AdamW at the point of SGD, or at the point where it started; (b) half the difference of squared norms; a
distance to the equilibrium per neuron that is not smaller than with the formula of SGD.

Source: this project.
"""

import math
from dataclasses import replace
from typing import NamedTuple, final

from matplotlib.figure import Figure

from noetherflow.optimizers import SGD, AdamW
from noetherflow.paper import style
from noetherflow.paper.claim import Claim
from noetherflow.paper.f10_limits import Limit, explore
from noetherflow.paper.f10_networks import Left, Task, train
from noetherflow.paper.f10_pictures import (
    decays_around,
    plot_ahead,
    plot_decay,
    plot_left,
    plot_limits,
    plot_rest,
    plot_starts,
    rms,
)
from noetherflow.paper.f10_problem import Rest, World, formula_of_sgd, simulate_direction, simulate_pair
from noetherflow.paper.f10_settings import Config

TITLE = "Under AdamW: square roots of second moments balance, not the second moments"
COORDINATE = "(1/4) log(|w|² / |u|²)"


@final
class Outcome(NamedTuple):
    """The simulations.

    Args:
        pairs: Regression without decay under AdamW, with isotropic variances, by seed.
        generic: The regression with different variances.
        sgd: The regression under SGD.
        decayed: Regression under AdamW by weight decay.
        balance: The regression with a decay that makes both norms almost equal.
        spheres: The scale-invariant weight, by seed.
        networks: ReLU networks by weight decay.
        limits: Settings at which the theory stops to hold, by name.
    """

    pairs: list[Rest]
    generic: Rest
    sgd: Rest
    decayed: dict[float, Rest]
    balance: Rest
    spheres: list[Rest]
    networks: dict[float, Left]
    limits: dict[str, Limit]


def run(config: Config) -> Outcome:
    """Simulate the regression under AdamW and SGD, the scale-invariant weight, the networks, and the limits."""
    world, adamw, seed = config.world(), config.adamw(), config.seed

    def pair(settings: SGD | AdamW, seed: int, world: World = world, starts: tuple[float, ...] = config.starts) -> Rest:
        return simulate_pair(world, settings, starts, config.replicas, config.steps, seed)

    seeds = range(seed, seed + config.repeats)
    balance = replace(adamw, lr=config.balance_lr, weight_decay=config.balance_decay)
    around = [0.5 * math.log(config.entries_lr * config.entries / (2 * config.entries_decay)) + d for d in (-0.7, 0.4)]
    task = Task(inputs=4, width=config.width, outputs=4)
    networks = {
        decay: AdamW(config.network_lr, weight_decay=decay, batch_size=config.network_batch_size)
        for decay in config.network_decays
    }
    return Outcome(
        pairs=[pair(adamw, seed) for seed in seeds],
        generic=pair(adamw, seed, config.world(config.spread)),
        sgd=pair(SGD(config.lr, config.batch_size), seed),
        decayed={decay: pair(config.adamw(decay), seed) for decay in config.decays},
        balance=pair(balance, seed, starts=config.balance_starts),
        spheres=[
            simulate_direction(config.sphere, config.entries, around, config.replicas, config.steps, seed)
            for seed in seeds
        ],
        networks={
            decay: train(task, settings, config.networks, config.network_steps, config.unbalance, seed)
            for decay, settings in networks.items()
        },
        limits=explore(world, adamw, config.limits, config.starts, config.replicas // 2, config.steps, seed),
    )


def claims(config: Config, outcome: Outcome) -> list[Claim]:
    """Compare the measurements with the predictions."""
    world, size = config.world(), config.batch_size

    def pair(text: str, rests: list[Rest], adamw: AdamW, world: World = world) -> list[Claim]:
        sgd = world.rest(formula_of_sgd(adamw), size)
        return _rest_claims(text, rests, world.rest(adamw, size), sgd)

    verdicts = pair("(a) (1/4) log |w|^2 / |u|^2", outcome.pairs, config.adamw())
    verdicts += pair("(a) generic variances: x", [outcome.generic], config.adamw(), config.world(config.spread))
    verdicts.append(_sgd_claim(config, outcome.sgd))
    for decay, rest in outcome.decayed.items():
        verdicts += pair(f"(b) decay {decay:g}: x", [rest], config.adamw(decay))
    verdicts.append(_balance_claim(config, outcome.balance))
    for decay, left in outcome.networks.items():
        verdicts += _network_claims(f"(b) ReLU network, decay {decay:g}", left)
    verdicts += _rest_claims("(c) log |theta|", outcome.spheres, *_lengths(config))
    return verdicts + _limit_claims(config, outcome.limits)


def _rest_claims(text: str, rests: list[Rest], predicted: float, sgd: float) -> list[Claim]:
    """Compare where AdamW rests, of all seeds and starts, with the formulas of AdamW and SGD."""
    # Of all seeds and starts the mean over replicas that is farthest from the prediction.
    rest = max(rests, key=lambda rest: abs(rest.farthest(predicted) - predicted))
    far = rest.farthest(predicted)
    starts = {f"gradient descent from start {k + 1}": x for k, x in enumerate(rest.x[0].mean(1).tolist())}
    return [
        _claim(f"{text}, the farthest of {len(rests)} x 2 runs", far, predicted, sgd, rest.error, starts),
        Claim(
            f"{text}: position between the formulas of SGD (0) and AdamW (1)",
            predicted=1.0,
            measured=(far - sgd) / (predicted - sgd) if predicted != sgd else math.nan,
            # Five times as far from the formula of SGD as from that of AdamW.
            low=5 / 6,
            high=5 / 4,
            error=rest.error / abs(predicted - sgd) if predicted != sgd else None,
            wrong={"the formula of SGD": 0.0},
        ),
    ]


def _claim(text: str, measured: float, predicted: float, sgd: float, error: float, wrong: dict[str, float]) -> Claim:
    """Compare a coordinate with its prediction; the band leaves out the formula of SGD."""
    allowed = min(0.05, abs(predicted - sgd) / 5)
    return Claim(
        text,
        predicted=predicted,
        measured=measured,
        low=predicted - allowed,
        high=predicted + allowed,
        error=error,
        wrong={"the formula of SGD": sgd} | wrong,
    )


def _sgd_claim(config: Config, rest: Rest) -> Claim:
    """SGD itself rests where its formula says, which is not where AdamW rests."""
    predicted = config.world().rest(formula_of_sgd(config.adamw()), config.batch_size)
    return Claim(
        "(a) SGD: x, the farther of 2 starts",
        predicted=predicted,
        measured=rest.farthest(predicted),
        low=predicted - 0.05,
        high=predicted + 0.05,
        error=rest.error,
        wrong={"the formula of AdamW": config.world().rest(config.adamw(), config.batch_size)},
    )


def _balance_claim(config: Config, rest: Rest) -> Claim:
    """Compare the difference of squared norms under a large decay with eta (n - m) / lambda."""
    adamw = replace(config.adamw(config.balance_decay), lr=config.balance_lr)
    world, unit = config.world(), config.balance_lr * (config.inputs - config.outputs) / config.balance_decay

    def share(settings: SGD | AdamW) -> float:
        params = world.minimum(world.rest(settings, config.batch_size))
        return ((params["w"].square().sum() - params["u"].square().sum()) / unit).item()

    late = rest.charge[len(rest.charge) // 2 :].mean(0) / unit
    return Claim(
        f"(b) decay {config.balance_decay:g}: (|w|^2 - |u|^2) / (lr (n - m) / decay)",
        predicted=share(adamw),
        measured=late.mean().item(),
        low=share(adamw) - 0.1,
        high=share(adamw) + 0.1,
        error=(late.flatten().std() / late.numel() ** 0.5).item(),
        wrong={"equal v of all entries": 0.5, "the formula of SGD": share(formula_of_sgd(adamw))},
    )


def _network_claims(text: str, left: Left) -> list[Claim]:
    """Compare what is left to the equilibrium per neuron with zero, and with what the formula of SGD leaves."""
    adamw, sgd = rms(left.adamw), rms(left.sgd)
    return [
        Claim(
            f"{text}: rms of what is left over {len(left.adamw)} live of {left.neurons} neurons",
            predicted=0.0,
            measured=adamw,
            high=0.1,
            wrong={"the formula of SGD": sgd},
        ),
        Claim(
            f"{text}: that over what the formula of SGD leaves",
            predicted=0.0,
            measured=adamw / sgd,
            high=0.5,
            wrong={"the formula of SGD": 1.0},
        ),
    ]


def _limit_claims(config: Config, limits: dict[str, Limit]) -> list[Claim]:
    """What the formula still says with changed settings, of those that were simulated."""
    world, size, verdicts = config.world(), config.batch_size, []
    without = {"eps 0.1": "without eps", "eps 1": "without eps", "L2 0.01": "decoupled"}
    for name, mistake in without.items():
        if name in limits:
            limit = limits[name]
            decay = 0.0 if mistake == "without eps" else 0.01
            wrong = {mistake: world.rest(config.adamw(decay), size), "the formula of SGD": limit.sgd}
            allowed = 0.05 if name == "eps 1" else 0.03
            low, high = limit.predicted - allowed, limit.predicted + allowed
            far = limit.rest.farthest(limit.predicted)
            verdicts.append(
                Claim(f"(d) {name}: x", limit.predicted, far, low, high, error=limit.rest.error, wrong=wrong)
            )
    if "decay 1" in limits:
        limit = limits["decay 1"]
        ratio = limit.rest.left.abs().max().item() / abs(limit.off)
        text = "(d) decay 1: left from measured v, over the error of the prediction from label noise"
        verdicts.append(Claim(text, 0.0, ratio, high=0.5, wrong={"v of the label noise": 1.0}))
    if "reference" in limits:
        limit = limits["reference"]
        lag = 1 / (1 - config.adamw().betas_of("")[1])
        ratio = limit.rest.relaxation / (limit.relaxation + lag)
        text = "(d) relaxation over that of frozen v plus 1 / (1 - beta2) steps"
        wrong = {"without the lag": limit.relaxation / (limit.relaxation + lag)}
        verdicts.append(Claim(text, 1.0, ratio, low=0.8, high=1.2, wrong=wrong))
    return verdicts


def _lengths(config: Config) -> tuple[float, float]:
    r"""The predicted $\log|\theta|$ under AdamW, and by the formula of SGD."""
    scale = config.entries_lr / (2 * config.entries_decay)
    # SGD: |theta|^4 = lr |theta|^2 Tr Sigma / (2 decay S), with c - 1 tangential directions of variance 1 / |theta|^2.
    sgd = 0.25 * math.log(scale * (config.entries - 1) / config.batch_size)
    return 0.5 * math.log(scale * config.entries), sgd


def plot(config: Config, outcome: Outcome) -> Figure:
    """Draw the regression, weight decay, the scale-invariant weight, the networks, and the changed settings."""
    figure = style.panels(3, height=7.2)
    pair, decay, sphere, left, ahead, limits = figure.subplots(2, 3).flat
    world, adamw, size = config.world(), config.adamw(), config.batch_size
    plot_rest(pair, outcome.pairs[0], world.rest(adamw, size), world.rest(formula_of_sgd(adamw), size))
    plot_starts(pair, outcome.sgd, style.CONTRAST, "SGD")
    pair.set(ylabel=COORDINATE, title=f"(a) {config.inputs} inputs, {config.outputs} outputs")
    settings = {weight_decay: config.adamw(weight_decay) for weight_decay in decays_around(config.decays)}
    by_sgd = [world.rest(formula_of_sgd(adamw), size) for adamw in settings.values()]
    predicted = [world.rest(adamw, size) for adamw in settings.values()]
    plot_decay(decay, list(settings), predicted, by_sgd, outcome.decayed)
    decay.set_ylabel(COORDINATE)
    plot_rest(sphere, outcome.spheres[0], *_lengths(config))
    sphere.set(ylabel=r"log |$\theta$|", title=f"(c) scale-invariant weight of {config.entries} entries")
    for axes in (pair, decay, sphere):
        axes.legend(fontsize=7)
    plot_left(left, outcome.networks)
    plot_ahead(ahead, outcome.networks)
    plot_limits(limits, outcome.limits)
    return figure
