"""The settings of optimizers, and the only home of the factors of two."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch

from noetherflow._errors import SettingsError


@final
@dataclass(frozen=True)
class SGD:
    r"""The settings of stochastic gradient descent, and what they mean in continuous time.

    One step with a minibatch gradient $g_S$ is
    $\theta' = \theta - \mathrm{lr}\,(g_S + 2\gamma\theta)$. With $t = \mathrm{lr} \times \text{steps}$ its diffusion
    limit is

    $$d\theta = -\nabla L_\gamma\,dt + \sqrt{2\sigma^2\,\Sigma}\,dW, \qquad 2\sigma^2 = \mathrm{lr}/S ,$$

    where $\Sigma$ is the centred covariance of the gradient of a *single* example.

    Args:
        lr: Learning rate, positive.
        batch_size: Examples per step, $S$.
        weight_decay: As in `torch.optim.SGD`, that is $2\gamma$.
        momentum: Heavy-ball $\mu$ in [0, 1). The slow dynamics is that of plain SGD with lr / (1 - momentum).
        replacement: Whether the examples of a minibatch are drawn independently. A shuffled DataLoader draws
            without replacement.
        dataset_size: Number of examples $N$ of the data set; needed (and used) only without replacement, where the
            noise of a minibatch is smaller by $(N - S)/(N - 1)$.

    Raises:
        SettingsError: If a setting is out of range.

    Examples:
        >>> import noetherflow as nf
        >>> sgd = nf.SGD(lr=0.1, batch_size=10, weight_decay=0.02)
        >>> sgd.gamma, sgd.temperature
        (0.01, 0.005)

    Source: Ziyin, Wang, Li, Wu (2024), section 3; the minibatch factor is that of sampling from a finite population.
    """

    lr: float
    batch_size: int
    weight_decay: float = 0.0
    momentum: float = 0.0
    replacement: bool = True
    dataset_size: int | None = None

    def __post_init__(self) -> None:
        _require(self.lr, "lr", "a finite number above 0", lambda lr: 0 < lr < float("inf"))
        _require(self.batch_size, "batch_size", "a whole number, 1 or more", lambda n: n == int(n) and n >= 1)
        _require(self.weight_decay, "weight_decay", "a finite number, 0 or more", lambda w: 0 <= w < float("inf"))
        _require(self.momentum, "momentum", "a number in [0, 1)", lambda mu: 0 <= mu < 1)
        if not self.replacement:
            if self.dataset_size is None:
                raise SettingsError(
                    "sampling without replacement has less noise in a small data set, by (N - S)/(N - 1): "
                    "give its size too, SGD(..., replacement=False, dataset_size=len(dataset))"
                )
            _require(
                self.dataset_size, "dataset_size", f"at least batch_size = {self.batch_size}", self.batch_size.__le__
            )

    @property
    def gamma(self) -> float:
        r"""Weight decay as the theory writes it, $\ell + \gamma|\theta|^2$: half of PyTorch's `weight_decay`."""
        return self.weight_decay / 2

    @property
    def effective_lr(self) -> float:
        """The learning rate of the slow dynamics, lr / (1 - momentum); time is effective_lr times steps."""
        return self.lr / (1 - self.momentum)

    @property
    def sampling_factor(self) -> float:
        """Variance of a minibatch mean over that of independent draws: 1, or (N - S)/(N - 1)."""
        if self.replacement or self.dataset_size is None:
            return 1.0
        if self.dataset_size == 1:
            return 0.0
        return (self.dataset_size - self.batch_size) / (self.dataset_size - 1)

    @property
    def temperature(self) -> float:
        r"""The noise level $\sigma^2 = \mathrm{lr} / 2S$, momentum and sampling without replacement included."""
        return self.effective_lr / (2 * self.batch_size) * self.sampling_factor

    @classmethod
    def from_optimizer(
        cls,
        optimizer: torch.optim.Optimizer,
        *,
        batch_size: int,
        replacement: bool = True,
        dataset_size: int | None = None,
    ) -> "SGD":
        """Read the settings of a `torch.optim.SGD`.

        Args:
            optimizer: The optimizer that trains the model; all its parameter groups must share their settings.
            batch_size: Examples per step, which an optimizer does not know.
            replacement: See the class.
            dataset_size: See the class.

        Returns:
            The settings, ready for `drift` and `solve_equilibrium`.

        Raises:
            SettingsError: If it is another optimizer, uses dampening or maximises, or if its groups differ.

        Examples:
            >>> import torch, noetherflow as nf
            >>> optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1, weight_decay=0.01)
            >>> nf.SGD.from_optimizer(optimizer, batch_size=32)
            SGD(lr=0.1, batch_size=32, weight_decay=0.01, momentum=0, replacement=True, dataset_size=None)
        """
        if not isinstance(optimizer, torch.optim.SGD):
            raise SettingsError(
                f"expected torch.optim.SGD, got {type(optimizer).__name__}: an adaptive optimizer breaks the symmetry, "
                "and rests at another point than the equilibrium of SGD"
            )
        names = ("lr", "weight_decay", "momentum", "dampening", "maximize")
        groups = [{name: _number(group[name]) for name in names} for group in optimizer.param_groups]
        if any(group != groups[0] for group in groups):
            raise SettingsError(f"all parameter groups must share their settings, got {groups}")
        settings = groups[0]
        if settings["dampening"] or settings["maximize"]:
            raise SettingsError(
                "dampening and maximize change the meaning of a step: use dampening=0 and maximize=False"
            )
        return cls(
            lr=settings["lr"],
            batch_size=batch_size,
            weight_decay=settings["weight_decay"],
            momentum=settings["momentum"],
            replacement=replacement,
            dataset_size=dataset_size,
        )


def _require(value: Any, name: str, expected: str, holds: Callable[[Any], bool]) -> None:
    try:
        good = bool(holds(value))
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good:
        raise SettingsError(f"{name} must be {expected}, got {value!r}")


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value
