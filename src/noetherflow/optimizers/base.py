"""What a solver needs to know of an optimizer, whichever it is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

from torch import Tensor, nn

from noetherflow._types import Params


class Terms(NamedTuple):
    r"""The terms of the potential that belong to a parameter, entry by entry, and the entries' parts of the charge.

    Args:
        decay: $a_p$, the term of the weight decay, which grows as $e^{k s_p}$ along an orbit that scales the entry by
            $e^{s_p}$, with k = `Exponents.decay`.
        noise: $b_p$, the term of the gradient noise, which falls as $e^{-k s_p}$ with k = `Exponents.noise`.
        charge: $\theta_p^2$ over the step size of the entry.
    """

    decay: Tensor
    noise: Tensor
    charge: Tensor


class Exponents(NamedTuple):
    """How the terms of a parameter change along an orbit that scales an entry by $e^s$ and its gradients by $e^{-s}$.

    Args:
        decay: The term of the weight decay is multiplied by $e^{k s}$.
        noise: The term of the gradient noise is multiplied by $e^{-k s}$.
        charge: The entry's part of the charge, with the step sizes of the new point, is multiplied by $e^{k s}$.
    """

    decay: int
    noise: int
    charge: int


@dataclass(frozen=True)
class Optimizer(ABC):
    r"""The settings of an optimizer, as far as a solver needs to know them.

    An optimizer moves entry p of the parameters by its step size $\eta_p$ times a gradient. A symmetry that scales
    entries, with a diagonal generator Q, then has the charge $C = \sum_p q_p\,\theta_p^2 / \eta_p$. The gradients of
    all examples are orthogonal to the orbit, so that the mean gradient does not move C to first order. Weight decay and
    the squares of the gradients move C. On the orbit, the mean change of C per step is minus the slope of a convex
    potential,

    $$\Phi(x) = \sum_p a_p\,e^{k s_p(x)} + b_p\,e^{-k' s_p(x)} ,$$

    where the entry p is scaled by $e^{s_p(x)}$. The terms a and b depend on the second moment of the gradient of a
    minibatch, which `share` and `with_mean` describe.
    """

    @property
    @abstractmethod
    def exponents(self) -> Exponents:
        """How the terms of the potential change along an orbit."""

    @property
    @abstractmethod
    def share(self) -> float | None:
        """The variance of a minibatch gradient over that of a single example; None if the batch size is not known."""

    @property
    @abstractmethod
    def with_mean(self) -> bool:
        """Whether the square of the mean gradient counts beside the variance."""

    @abstractmethod
    def terms(self, name: str, theta: Tensor, moment: Tensor) -> Terms:
        """The terms of a parameter.

        Args:
            name: The name of the parameter.
            theta: Its values.
            moment: The second moment of a minibatch gradient, entry by entry.

        Returns:
            The terms, of the shape of the parameter.

        Raises:
            SettingsError: If the settings say nothing of this parameter.
        """

    @abstractmethod
    def trains(self, name: str) -> bool:
        """Whether a parameter group holds the parameter."""

    @property
    @abstractmethod
    def derived(self) -> dict[str, Any]:
        """Numbers that follow from the settings and are worth a line in a report."""

    @property
    def listed(self) -> dict[str, Any]:
        """The name of the optimizer, its settings, and the numbers that follow from them, for a report."""
        return {"optimizer": type(self).__name__} | asdict(self) | self.derived

    @abstractmethod
    def named_by(self, params: nn.Module | Params) -> Self:
        """These settings with the names of the parameters of a model, where settings differ between parameters."""


def is_trained(name: str, *settings: object) -> bool:
    """Whether every setting holds for a parameter: a mapping leaves out what is not trained."""
    return all(not isinstance(setting, Mapping) or name in setting for setting in settings)
