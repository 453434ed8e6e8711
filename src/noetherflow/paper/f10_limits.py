"""F10: where the equilibrium of AdamW stops to hold: settings that are changed one at a time."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, final

from noetherflow.optimizers import AdamW
from noetherflow.paper.f10_problem import Rest, World, formula_of_sgd, simulate_pair


@final
class Limit(NamedTuple):
    """A setting that differs from the reference, and where AdamW rests with it.

    Args:
        name: The setting.
        predicted: x by the formula of AdamW, from the second moments of the label noise.
        sgd: x by the formula of SGD.
        relaxation: Steps of relaxation with v frozen.
        rest: The simulation.
    """

    name: str
    predicted: float
    sgd: float
    relaxation: float
    rest: Rest

    @property
    def off(self) -> float:
        """Measured minus predicted x, of the start that ends farther away."""
        return self.rest.farthest(self.predicted) - self.predicted


def changes(adamw: AdamW) -> dict[str, AdamW]:
    """Every changed setting by its name."""
    lr, beta = adamw.lr_of(""), adamw.betas_of("")[0]
    changed = {"reference": adamw}
    changed |= {f"beta2 {b:g}": replace(adamw, betas=(beta, b)) for b in (0.9, 0.99, 0.9999)}
    changed |= {f"beta1 {b:g}": replace(adamw, betas=(b, 0.999)) for b in (0.0, 0.99)}
    changed |= {f"lr {rate:g}": replace(adamw, lr=rate) for rate in (3 * lr, 10 * lr)}
    changed |= {f"S {size}": replace(adamw, batch_size=size) for size in (1, 64)}
    changed |= {f"eps {eps:g}": replace(adamw, eps=eps) for eps in (0.1, 1.0)}
    changed |= {f"L2 {decay:g}": replace(adamw, weight_decay=decay, decoupled=False) for decay in (0.01, 0.1)}
    return changed | {"decay 1": replace(adamw, weight_decay=1.0)}


def explore(
    world: World, adamw: AdamW, names: Sequence[str], starts: Sequence[float], replicas: int, steps: int, seed: int
) -> dict[str, Limit]:
    """Simulate the changed settings of the given names."""
    limits = {}
    for name in names:
        settings = changes(adamw)[name]
        size = settings.batch_size or 1
        limits[name] = Limit(
            name,
            world.rest(settings, size),
            world.rest(formula_of_sgd(settings), size),
            world.relaxation(settings, size),
            simulate_pair(world, settings, starts, replicas, steps, seed),
        )
    return limits
