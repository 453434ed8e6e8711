"""Second moments of the gradients of minibatches, from the noise of single examples or from the state of Adam."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import final

import torch
from torch import Tensor

from noetherflow._errors import ParameterShapeError, SettingsError
from noetherflow._second_moments import SecondMoments, require_usable
from noetherflow.noise import NoiseMoments
from noetherflow.optimizers import Optimizer, Terms
from noetherflow.symmetry import Grams, Symmetry


class Minibatches(ABC):
    r"""The gradients of the minibatches of an optimizer, at the parameters where they were measured.

    Args:
        optimizer: The settings. They say which second moment counts: with the covariance $\Sigma$ of the gradient of a
            single example, f / S times $\Sigma$, with or without the square of the mean gradient.
        symmetries: By name, with canonical parameter names.
    """

    def __init__(self, optimizer: Optimizer, symmetries: Mapping[str, Symmetry]) -> None:
        self.optimizer, self.symmetries = optimizer, symmetries

    @abstractmethod
    def moment(self, name: str) -> Tensor:
        """The second moment of every entry of a parameter on which a symmetry that scales entries acts."""

    @abstractmethod
    def grams(self, name: str) -> Grams:
        """The Grams of a symmetry, averaged over minibatches."""

    @abstractmethod
    def noise(self, name: str) -> Grams:
        """What `trace` counts of the Grams of a symmetry."""

    @abstractmethod
    def total(self) -> Tensor:
        """The second moment, summed over all trained parameters; shape ()."""

    @abstractmethod
    def trace(self) -> Tensor:
        """What is reported as the noise of all trained parameters; shape ()."""

    @abstractmethod
    def shares(self, name: str) -> Tensor:
        """The parts of `trace` that belong to the entries of a parameter."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """The parameters that were measured."""

    def terms(self, name: str, theta: Tensor) -> Terms:
        """The terms of the potential that belong to a parameter, at its values."""
        moment = self.moment(name)
        if moment.shape != theta.shape:
            raise ParameterShapeError(
                f"the gradients of {name!r} have the shape {tuple(moment.shape)}, the parameter {tuple(theta.shape)}: "
                "they were measured for another model"
            )
        return self.optimizer.terms(name, theta, moment)

    def have_decay(self, names: Iterable[str]) -> bool:
        """Whether all of these parameters have weight decay: a term for an entry of 1 with a gradient of 1."""
        unit = torch.ones(1, dtype=torch.float64)
        return all(bool(self.optimizer.terms(name, unit, unit).decay > 0) for name in names)


@final
class OfExamples(Minibatches):
    """From the noise of single examples."""

    def __init__(self, noise: NoiseMoments, optimizer: Optimizer) -> None:
        super().__init__(optimizer, noise.symmetries)
        noise.require_examples()
        if optimizer.share is None:
            raise SettingsError(
                "the noise of single examples says what the gradients of minibatches are only with the batch size: "
                f"give nf.{type(optimizer).__name__}(..., batch_size=...), or the statistics of nf.second_moments"
            )
        if optimizer.with_mean and any(torch.isnan(mean).any() for mean in noise.mean.values()):
            raise SettingsError(
                "the second moment of the gradient of a minibatch needs the mean gradient, which a meter does not "
                "keep: measure with estimate_noise"
            )
        self._noise, self._share = noise, optimizer.share
        self._grams = noise.grams

    def moment(self, name: str) -> Tensor:
        """The variance of the minibatch, and the square of the mean where it counts."""
        scaled = self._share / self._noise.count * self._noise.square_scatter[name]
        return scaled + self._noise.mean[name].square() if self.optimizer.with_mean else scaled

    def grams(self, name: str) -> Grams:
        """The Grams of the noise, and of the mean where it counts."""
        plus, minus = (self._share * side for side in self._grams[name])
        if not self.optimizer.with_mean:
            return Grams(plus, minus)
        mean = self.symmetries[name].grams(self._noise.mean)
        return Grams(plus + mean.plus, minus + mean.minus)

    def noise(self, name: str) -> Grams:
        """The Grams of the noise, per example."""
        return self._grams[name]

    def total(self) -> Tensor:
        """Over all trained parameters."""
        noise = self._share * self._noise.trace
        if not self.optimizer.with_mean:
            return noise
        return noise + torch.stack([mean.square().sum() for mean in self._noise.mean.values()]).sum()

    def trace(self) -> Tensor:
        """Tr Sigma, per example."""
        return self._noise.trace

    def shares(self, name: str) -> Tensor:
        """The variance of every entry, per example."""
        return self._noise.square_scatter[name] / self._noise.count

    @property
    def names(self) -> list[str]:
        """The parameters that were measured."""
        return [*self._noise.mean]


@final
class OfAdam(Minibatches):
    """From the averages of squares of gradients that Adam keeps."""

    def __init__(self, moments: SecondMoments, optimizer: Optimizer) -> None:
        super().__init__(optimizer, moments.symmetries)
        if not optimizer.with_mean:
            raise SettingsError(
                f"second moments include the square of the mean gradient, which nf.{type(optimizer).__name__} does not "
                "count: measure the noise with estimate_noise, or give finite_step=True"
            )
        require_usable(moments)
        self._values = moments.values

    def moment(self, name: str) -> Tensor:
        """The average that Adam keeps."""
        return self._values[name]

    def grams(self, name: str) -> Grams:
        """Of a symmetry that scales entries."""
        symmetry = self.symmetries[name]
        return symmetry.grams({parameter: self._values[parameter].sqrt() for parameter in symmetry.names})

    def noise(self, name: str) -> Grams:
        """The Grams of a symmetry that scales entries."""
        return self.grams(name)

    def total(self) -> Tensor:
        """Over all parameters with a state."""
        return torch.stack([tensor.sum() for tensor in self._values.values()]).sum()

    def trace(self) -> Tensor:
        """The second moment of the gradient of a minibatch."""
        return self.total()

    def shares(self, name: str) -> Tensor:
        """The second moment of every entry."""
        return self._values[name]

    @property
    def names(self) -> list[str]:
        """The parameters with a state."""
        return [*self._values]


def minibatches(gradients: NoiseMoments | SecondMoments, optimizer: Optimizer) -> Minibatches:
    """The second moments on which an optimizer depends, from either kind of statistics.

    Args:
        gradients: The noise of single examples, or what Adam keeps.
        optimizer: The settings.

    Returns:
        The second moments.

    Raises:
        SettingsError: If the statistics do not determine the second moments.
        EmptyDataError: If the noise holds no examples.
    """
    if isinstance(gradients, SecondMoments):
        return OfAdam(gradients, optimizer)
    return OfExamples(gradients, optimizer)
