"""F10: the settings."""

from dataclasses import dataclass
from typing import final

from noetherflow.optimizers import AdamW
from noetherflow.paper.f10_problem import World

# The settings of `f10_limits.changes` at the default learning rate.
LIMITS = (
    *("reference", "beta2 0.9", "beta2 0.99", "beta2 0.9999", "beta1 0", "beta1 0.99", "lr 0.06", "lr 0.2", "S 1"),
    *("S 64", "eps 0.1", "eps 1", "L2 0.01", "L2 0.1", "decay 1"),
)


@final
@dataclass(frozen=True)
class Config:
    """Settings of the experiment; the defaults are the full size."""

    inputs: int = 12
    outputs: int = 3
    length: float = 1.5
    spread: float = 10.0
    lr: float = 0.02
    batch_size: int = 4
    starts: tuple[float, ...] = (0.1, 1.2)
    replicas: int = 16
    repeats: int = 3
    steps: int = 24_000
    decays: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    balance_lr: float = 0.005
    balance_decay: float = 0.15
    balance_starts: tuple[float, ...] = (0.0, 0.1)
    entries: int = 32
    entries_lr: float = 0.02
    entries_decay: float = 0.04
    width: int = 12
    network_lr: float = 0.01
    network_batch_size: int = 16
    network_decays: tuple[float, ...] = (0.0, 0.01)
    network_steps: int = 60_000
    networks: int = 4
    unbalance: float = 0.5
    limits: tuple[str, ...] = LIMITS
    seed: int = 0

    @classmethod
    def quick(cls) -> "Config":
        """Reduced sizes with which every claim still excludes the mistakes in `Claim.wrong`."""
        return cls(
            replicas=8,
            repeats=1,
            lr=0.03,
            starts=(0.2, 1.0),
            steps=8_000,
            balance_lr=0.01,
            decays=(0.01,),
            network_decays=(0.03,),
            network_steps=10_000,
            networks=2,
            width=8,
            limits=("L2 0.01", "decay 1"),
        )

    def adamw(self, weight_decay: float = 0.0) -> AdamW:
        """AdamW for the regression."""
        return AdamW(self.lr, weight_decay=weight_decay, batch_size=self.batch_size)

    def world(self, spread: float = 1.0) -> World:
        """The regression, with isotropic inputs and label noise by default."""
        return World.of(self.inputs, self.outputs, self.length, spread)

    @property
    def sphere(self) -> AdamW:
        """AdamW for the scale-invariant weight."""
        return AdamW(self.entries_lr, weight_decay=self.entries_decay, batch_size=self.batch_size)
