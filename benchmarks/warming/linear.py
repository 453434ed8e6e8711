"""F4's problem: two linear layers with a single hidden unit, label noise, and batches of a single example."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import noetherflow as nf
from noetherflow.linear import TwoLayer
from noetherflow.paper import f4_warmup as f4
from noetherflow.paper import f12_linear, f12_settings, linear_pair
from warming.case import SEEDS, Schedule, State

# Gradient descent that ends at a minimum.
DESCENT, DESCENT_STEPS = 1e-2, 30_000
# A loss from which a run counts as diverged.
LOST = 1e6
# Steps whose examples are drawn together.
DRAWN = 1000


@dataclass
class F4:
    """F4's problem from an initialisation, as built or at the end of gradient descent."""

    name: str
    scale: Callable[[int, int], float]
    descends: bool
    lr: float = f4.Config().lr

    def __post_init__(self) -> None:
        self.config = f4.Config(inits=SEEDS)
        self.target = self.config.world().target

    def starts(self) -> State:
        params = f4.starts_of(self.config, self.scale, torch.Generator().manual_seed(self.config.seed))
        u, w = params["u"], params["w"]
        for _ in range(DESCENT_STEPS if self.descends else 0):
            error = u @ w - self.target
            u, w = u - DESCENT * 2 * error @ w.mT, w - DESCENT * 2 * u.mT @ error
        return {"u": u, "w": w}

    def forecast(self, params: State, seed: int) -> nf.Forecast:
        world = self.config.world()
        stacked = linear_pair.replicated([(world, TwoLayer(params["u"][0], params["w"][0]))])
        return f12_linear.forecast_of(f12_settings.Config(), stacked, 0, nf.SGD(self.lr, 1), seed)

    def train(self, params: State, schedules: Sequence[Schedule], steps: int, seeds: Sequence[int]) -> State:
        """SGD with a new example per step, the gradient of |U W x - y|^2 written out."""
        u, w = params["u"].clone(), params["w"].clone()
        (outputs, _), inputs = u.shape[1:], w.shape[2]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for step in range(steps):
            if step % DRAWN == 0:
                shape = DRAWN, inputs + outputs, 1
                stacks = [torch.randn(shape, generator=each, dtype=torch.float64) for each in generators]
                drawn = torch.stack(stacks, 1)
            lr = torch.tensor([each(step) for each in schedules], dtype=torch.float64).view(-1, 1, 1)
            x, noise = drawn[step % DRAWN].split([inputs, outputs], 1)
            hidden = w @ x
            error = u @ hidden - self.target @ x - noise
            u, w = u - lr * 2 * error @ hidden.mT, w - lr * 2 * u.mT @ error @ x.mT
        return {"u": u, "w": w}

    def loss(self, params: State) -> Tensor:
        """The mean loss over all x and y, infinite for a run that is lost."""
        error = (params["u"] @ params["w"] - self.target).square().sum((1, 2)) + self.config.outputs
        return torch.where(error < LOST, error, torch.inf)


def of_f4() -> list[F4]:
    """From Kaiming and from Xavier initialisation, after gradient descent."""
    return [
        F4("F4, Kaiming, finished GD", f4.kaiming_scale, True),
        F4("F4, Xavier, finished GD", f4.xavier_scale, True),
    ]
