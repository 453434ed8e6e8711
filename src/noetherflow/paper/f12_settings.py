"""F12: the settings."""

from dataclasses import dataclass
from typing import final

# Groups of problems.
PROBLEMS = ("f3", "f4", "mlp", "cnn", "gpt2")


@final
@dataclass(frozen=True)
class Config:
    """Settings of the experiment; the defaults are the full size.

    Each of the three networks is trained on from two points: `early`, where it still learns, and at rest. `learn` is
    the number of steps to the first point, `steps` the number of steps that a forecast is compared with. `f3_slow` are
    the phis with which F3 is run once more at a quarter of its learning rate, and four times the steps.
    """

    problems: tuple[str, ...] = PROBLEMS
    seeds: int = 8
    f3_phis: tuple[float, ...] = (0.2, 1.0, 5.0)
    f3_label_noise: float = 6.0
    f3_steps: int = 40_000
    f3_slow: tuple[float, ...] = (0.2,)
    f4_starts: tuple[str, ...] = ("orbit", "finished", "unfinished")
    f4_lr: float = 5e-4
    f4_distance: float = 0.9
    f4_steps: int = 220_000
    images: int = 600
    flipped: float = 0.2
    digits_learn_lr: float = 0.1
    digits_learn: int = 200
    digits_lr: float = 0.03
    digits_batch_size: int = 4
    digits_decay: float = 3e-3
    mlp_rest: int = 1_500
    mlp_steps: int = 20_000
    cnn_rest: int = 500
    cnn_steps: int = 12_000
    gpt2_learn_lr: float = 3e-3
    gpt2_learn: int = 300
    gpt2_rest: int = 1_500
    gpt2_lr: float = 3e-3
    gpt2_batch_size: int = 16
    gpt2_decay: float = 0.1
    gpt2_steps: int = 3_000
    records: int = 40
    vectors: int = 16
    seed: int = 0

    @classmethod
    def quick(cls) -> "Config":
        """Reduced sizes with which every claim still excludes the mistakes in `Claim.wrong`."""
        return cls(
            problems=("f3", "mlp"),
            seeds=2,
            f3_phis=(1.0,),
            f3_slow=(),
            f3_steps=4_000,
            images=200,
            digits_learn=100,
            mlp_rest=800,
            mlp_steps=5_000,
            records=12,
        )
