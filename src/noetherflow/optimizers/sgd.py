"""Stochastic gradient descent: its settings, and the only home of its factors of two."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from noetherflow._errors import SettingsError
from noetherflow._types import Params
from noetherflow.optimizers.base import Exponents, Optimizer, Terms, is_trained
from noetherflow.optimizers.by_parameter import Setting, by_names, kept, number, of_groups, value_of
from noetherflow.optimizers.checks import (
    filled_groups,
    require,
    require_batches,
    require_setting,
    sampling_factor,
    shared,
)


@final
@dataclass(frozen=True)
class SGD(Optimizer):
    r"""The settings of stochastic gradient descent, and what they mean in continuous time.

    One step with a minibatch gradient $g_S$ is
    $\theta' = \theta - \mathrm{lr}\,(g_S + 2\gamma\theta)$. With $t = \mathrm{lr} \times \text{steps}$ its diffusion
    limit is

    $$d\theta = -\nabla L_\gamma\,dt + \sqrt{2\sigma^2\,\Sigma}\,dW, \qquad 2\sigma^2 = \mathrm{lr}/S ,$$

    where $\Sigma$ is the centred covariance of the gradient of a *single* example. Learning rate and weight decay may
    differ between parameters; $2\gamma\theta$ then has the entries $2\gamma_p\theta_p$. With learning rates
    $\mathrm{lr}_p$ that differ, gradient flow conserves the charge $\sum_p q_p \theta_p^2 / \mathrm{lr}_p$.

    Args:
        lr: Learning rate, positive: a number, or a number for each parameter by name, as for `weight_decay`.
        batch_size: Examples per step, $S$.
        weight_decay: As in `torch.optim.SGD`, that is $2\gamma$: a number, or a number for each parameter by name. A
            mapping has to name every parameter on which a symmetry acts. A parameter without a name in it counts as not
            trained.
        momentum: Heavy-ball $\mu$ in [0, 1). The slow dynamics is that of plain SGD with lr / (1 - momentum).
        replacement: Whether the examples of a minibatch are drawn independently. A shuffled DataLoader draws
            without replacement.
        dataset_size: Number of examples $N$ of the data set; needed (and used) only without replacement, where the
            noise of a minibatch is smaller by $(N - S)/(N - 1)$.
        finite_step: Whether the square of the mean gradient counts beside the noise. A step changes the charge by
            $\mathrm{lr}^2 C(g_S)$, whose mean is $\mathrm{lr}^2 (\mathrm{Tr}[\Sigma Q] / S + C(\nabla L))$. The
            diffusion limit neglects the second term, which is all that is left of it on the full batch.

    Raises:
        SettingsError: If a setting is out of range.

    Examples:
        >>> import noetherflow as nf
        >>> sgd = nf.SGD(lr=0.1, batch_size=10, weight_decay=0.02)
        >>> sgd.gamma, sgd.temperature
        (0.01, 0.005)

        No weight decay on the bias:

        >>> sgd = nf.SGD(lr=0.1, batch_size=10, weight_decay={"weight": 0.02, "bias": 0.0})
        >>> sgd.gamma_of("weight"), sgd.gamma_of("bias")
        (0.01, 0.0)

    Source: Ziyin, Wang, Li, Wu (2024), section 3; the minibatch factor is that of sampling from a finite population.
    """

    lr: Setting
    batch_size: int
    weight_decay: Setting = 0.0
    momentum: float = 0.0
    replacement: bool = True
    dataset_size: int | None = None
    finite_step: bool = False

    def __post_init__(self) -> None:
        require_setting(self.lr, "lr", "a finite number above 0", lambda lr: 0 < lr < math.inf)
        require_setting(self.weight_decay, "weight_decay", "a finite number, 0 or more", lambda w: 0 <= w < math.inf)
        for name in ("lr", "weight_decay"):
            object.__setattr__(self, name, kept(getattr(self, name)))
        require(self.momentum, "momentum", "a number in [0, 1)", lambda mu: 0 <= mu < 1)
        require_batches(self.batch_size, self.replacement, self.dataset_size)
        if self.finite_step and self.momentum:
            raise SettingsError(
                f"finite_step=True is defined for plain SGD, got momentum={self.momentum}: with momentum, the steps "
                "that the mean gradient takes depend on each other. Use momentum=0, or finite_step=False"
            )

    def __hash__(self) -> int:
        # Without learning rate and weight decay, which may be dictionaries.
        return hash((self.batch_size, self.momentum, self.replacement, self.dataset_size, self.finite_step))

    @property
    def gamma(self) -> float:
        r"""Weight decay as the theory writes it, $\ell + \gamma|\theta|^2$: half of PyTorch's `weight_decay`.

        Raises:
            SettingsError: If the weight decay is given by parameter.
        """
        if isinstance(self.weight_decay, Mapping):
            raise SettingsError("weight_decay is given by parameter, so there is no single gamma: use gamma_of(name)")
        return self.weight_decay / 2

    def gamma_of(self, name: str) -> float:
        r"""Weight decay $\gamma_p$ of a parameter as the theory writes it: half of PyTorch's `weight_decay`.

        Args:
            name: The name of the parameter, as in `named_parameters()`.

        Returns:
            The number; `gamma` if all parameters share it.

        Raises:
            SettingsError: If the weight decay is given by parameter and does not name this parameter.
        """
        return self.gamma if not isinstance(self.weight_decay, Mapping) else self._decay_of(name) / 2

    def _decay_of(self, name: str) -> float:
        return value_of(self.weight_decay, name, "weight_decay")

    def step_of(self, name: str) -> float:
        r"""Learning rate of the slow dynamics of a parameter, lr / (1 - momentum).

        Args:
            name: The name of the parameter, as in `named_parameters()`.

        Returns:
            The number; `effective_lr` if all parameters share it.

        Raises:
            SettingsError: If the learning rate is given by parameter and does not name this parameter.
        """
        return value_of(self.lr, name, "lr") / (1 - self.momentum)

    def named_by(self, params: nn.Module | Params) -> "SGD":
        """These settings with the weight decay by the names of the parameters of a model.

        Every public function that is given a model calls it.

        Args:
            params: The model, or its tensors by name.

        Returns:
            The settings. If the weight decay differs between parameters, it is a mapping with the names of
            `named_parameters()`, without the parameters that no parameter group holds.

        Raises:
            SettingsError: If the parameter groups hold no parameter of the model, or if a tied weight is given two
                weight decays.

        Examples:
            >>> import torch, noetherflow as nf
            >>> net = torch.nn.Linear(2, 1)
            >>> groups = [{"params": [net.weight], "weight_decay": 0.02}, {"params": [net.bias]}]
            >>> sgd = nf.SGD.from_optimizer(torch.optim.SGD(groups, lr=0.1), batch_size=10)
            >>> sgd.named_by(net).weight_decay
            {'weight': 0.02, 'bias': 0}
        """
        lr, decay = by_names(self.lr, params, "lr"), by_names(self.weight_decay, params, "weight_decay")
        unchanged = lr is self.lr and decay is self.weight_decay
        return self if unchanged else replace(self, lr=lr, weight_decay=decay)

    def trains(self, name: str) -> bool:
        """Whether the settings hold for a parameter: a mapping leaves out what no parameter group holds."""
        return is_trained(name, self.lr, self.weight_decay)

    @property
    def exponents(self) -> Exponents:
        """Squares of entries grow as $e^{2s}$, and squares of gradients fall as $e^{-2s}$."""
        return Exponents(2, 2, 2)

    @property
    def share(self) -> float:
        """The variance of a minibatch gradient over that of a single example: 1/S, or less without replacement."""
        return self.sampling_factor / self.batch_size

    @property
    def with_mean(self) -> bool:
        """Whether the mean gradient counts: at finite steps."""
        return self.finite_step

    @property
    def derived(self) -> dict[str, Any]:
        """Gamma, and the temperature."""
        decay, lr = self.weight_decay, self.lr
        return {
            "gamma": {name: self.gamma_of(name) for name in decay} if isinstance(decay, Mapping) else self.gamma,
            "temperature": (
                {name: self.share * self.step_of(name) / 2 for name in lr}
                if isinstance(lr, Mapping)
                else self.temperature
            ),
        }

    def terms(self, name: str, theta: Tensor, moment: Tensor) -> Terms:
        r"""$2\gamma_p\theta_p^2$, $\mathrm{lr}_p / 2$ times the second moment, and $\theta_p^2 / \mathrm{lr}_p$."""
        squares, step = theta.square(), self.step_of(name)
        return Terms(2 * self.gamma_of(name) * squares, step / 2 * moment, squares / step)

    @property
    def effective_lr(self) -> float:
        """The learning rate of the slow dynamics, lr / (1 - momentum); time is effective_lr times steps.

        Raises:
            SettingsError: If the learning rate is given by parameter.
        """
        if isinstance(self.lr, Mapping):
            raise SettingsError("lr is given by parameter, so there is no single learning rate: use step_of(name)")
        return self.lr / (1 - self.momentum)

    @property
    def sampling_factor(self) -> float:
        """Variance of a minibatch mean over that of independent draws: 1, or (N - S)/(N - 1)."""
        return sampling_factor(self.batch_size, self.replacement, self.dataset_size)

    @property
    def temperature(self) -> float:
        r"""The noise level $\sigma^2 = \mathrm{lr} / 2S$, momentum and sampling without replacement included."""
        return self.effective_lr / 2 * self.share

    @classmethod
    def from_optimizer(
        cls,
        optimizer: torch.optim.Optimizer,
        *,
        batch_size: int,
        model: nn.Module | None = None,
        replacement: bool = True,
        dataset_size: int | None = None,
        finite_step: bool = False,
    ) -> "SGD":
        """Read the settings of a `torch.optim.SGD`.

        Args:
            optimizer: The optimizer that trains the model. Learning rate and weight decay may differ between its
                parameter groups.
            batch_size: Examples per step, which an optimizer does not know.
            model: The model that gives parameters their names, where settings differ. Without it the names are
                those from which the optimizer was made, `torch.optim.SGD(model.named_parameters(), ...)`; if it was
                made from tensors, the names are those of the model with which the settings are used.
            replacement: See the class.
            dataset_size: See the class.
            finite_step: See the class.

        Returns:
            The settings, ready for `drift` and `solve_equilibrium`.

        Raises:
            SettingsError: If it is another optimizer, uses dampening or maximises, if its groups differ in
                momentum, or if it holds no parameter of the model.

        Examples:
            >>> import torch, noetherflow as nf
            >>> optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1, weight_decay=0.01)
            >>> nf.SGD.from_optimizer(optimizer, batch_size=32) == nf.SGD(0.1, 32, weight_decay=0.01)
            True
        """
        if not isinstance(optimizer, torch.optim.SGD):
            remedy = "give nf.AdamW.from_optimizer" if isinstance(optimizer, torch.optim.Adam) else "not covered here"
            raise SettingsError(
                f"expected torch.optim.SGD, got {type(optimizer).__name__}, whose equilibrium is another: {remedy}"
            )
        groups = filled_groups(optimizer)
        if any(number(group["dampening"]) or group["maximize"] for group in groups):
            raise SettingsError(
                "dampening and maximize change the meaning of a step: use dampening=0 and maximize=False"
            )
        return cls(
            lr=of_groups(groups, "lr", model),
            batch_size=batch_size,
            weight_decay=of_groups(groups, "weight_decay", model),
            momentum=shared(groups, "momentum"),
            replacement=replacement,
            dataset_size=dataset_size,
            finite_step=finite_step,
        )
