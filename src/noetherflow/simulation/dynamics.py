"""Settings of the dynamics that `simulate` accepts besides `SGD`: gradient descent and the continuous limits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

from noetherflow._errors import SettingsError
from noetherflow.optimizers import SGD, require_sgd


@final
@dataclass(frozen=True)
class GradientDescent:
    r"""Gradient descent on all examples: SGD without noise.

    $$\theta' = \theta - \mathrm{lr}\,(\nabla L + 2\gamma\theta)$$

    Args:
        lr: Learning rate, positive.
        weight_decay: $2\gamma$, as in `torch.optim.SGD`.
        momentum: Heavy-ball momentum in [0, 1).

    Raises:
        SettingsError: If a setting is out of range.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net, loss = torch.nn.Linear(2, 1), lambda model, x: model(x).square().sum(1)
        >>> trajectory = nf.simulate(net, loss, torch.randn(16, 2), nf.GradientDescent(lr=0.1), steps=50)
        >>> bool(trajectory.loss[-1] < trajectory.loss[0])
        True
    """

    lr: float
    weight_decay: float = 0.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        _require_number(self.weight_decay)
        self.settings()

    def settings(self) -> SGD:
        """The settings as an `SGD`, whose constructor checks them; the batch size has no meaning for a full batch."""
        return SGD(self.lr, batch_size=1, weight_decay=self.weight_decay, momentum=self.momentum)


@final
@dataclass(frozen=True)
class GradientFlow:
    r"""Gradient flow by the classical Runge-Kutta method of order four.

    $$d\theta/dt = -\nabla L - 2\gamma\theta$$

    Args:
        dt: Time step, positive. One step of SGD takes the time lr.
        weight_decay: $2\gamma$.

    Raises:
        SettingsError: If a setting is out of range.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net, loss = torch.nn.Linear(2, 1), lambda model, x: model(x).square().sum(1)
        >>> trajectory = nf.simulate(net, loss, torch.randn(16, 2), nf.GradientFlow(dt=0.1), steps=50)
        >>> bool(trajectory.loss[-1] < trajectory.loss[0])
        True
    """

    dt: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        require_time_step(self.dt)
        _require_number(self.weight_decay)
        SGD(1.0, 1, weight_decay=self.weight_decay)


@final
@dataclass(frozen=True)
class Langevin:
    r"""The diffusion limit of SGD, by Euler-Maruyama.

    $$d\theta = -(\nabla L + 2\gamma\theta)\,dt + \sqrt{2\sigma^2\Sigma(\theta)}\,dW$$

    The noise needs no covariance matrix. For independent standard normal numbers $\xi_1 \ldots \xi_N$, the vector
    $N^{-1/2} \sum_i (\xi_i - \bar\xi)\,\nabla\ell_i$ has covariance $\Sigma$, and it is the gradient of a weighted sum
    of losses.

    Args:
        sgd: Settings of SGD, from which $\gamma$ and $\sigma^2$ are taken.
        dt: Time step; by default the effective learning rate, so that a step corresponds to a step of SGD.

    Raises:
        SettingsError: If the time step is not positive.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net, loss = torch.nn.Linear(2, 1), lambda model, x: model(x).square().sum(1)
        >>> dynamics = nf.Langevin(nf.SGD(lr=0.1, batch_size=4))
        >>> nf.simulate(net, loss, torch.randn(16, 2), dynamics, steps=50, replicas=3).loss.shape
        torch.Size([51, 3])

    Source: Ziyin et al. (2024), section 3.
    """

    sgd: SGD
    dt: float | None = None

    def __post_init__(self) -> None:
        require_sgd(self.sgd, None, "the diffusion limit")
        require_time_step(self.time_step)

    @property
    def time_step(self) -> float:
        """`dt`, or the effective learning rate if `dt` is None."""
        return self.sgd.effective_lr if self.dt is None else self.dt


# A factor on the learning rate as a function of the step, such as a warmup.
Schedule = Callable[[int], float]


def _require_number(weight_decay: object) -> None:
    """Raise `SettingsError` if the weight decay is given by parameter."""
    if isinstance(weight_decay, Mapping):
        raise SettingsError(
            "gradient descent and gradient flow have a single weight_decay for all parameters, got one for each of "
            f"{[*weight_decay]}: give a number, or use SGD, Langevin or NoetherFlow"
        )


def require_time_step(dt: float) -> None:
    """Raise `SettingsError` unless a time step is a finite number above 0."""
    if not 0 < dt < float("inf"):
        raise SettingsError(f"dt must be a finite number above 0, got {dt!r}")
