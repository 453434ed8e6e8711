"""The settings of optimizers, and the only home of the factors of two."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import nn

from noetherflow._errors import SettingsError
from noetherflow._types import Params
from noetherflow._weight_decay import DecayByTensor, by_names, entries_of, number, of_groups


@final
@dataclass(frozen=True)
class SGD:
    r"""The settings of stochastic gradient descent, and what they mean in continuous time.

    One step with a minibatch gradient $g_S$ is
    $\theta' = \theta - \mathrm{lr}\,(g_S + 2\gamma\theta)$. With $t = \mathrm{lr} \times \text{steps}$ its diffusion
    limit is

    $$d\theta = -\nabla L_\gamma\,dt + \sqrt{2\sigma^2\,\Sigma}\,dW, \qquad 2\sigma^2 = \mathrm{lr}/S ,$$

    where $\Sigma$ is the centred covariance of the gradient of a *single* example. The weight decay may differ between
    parameters; $2\gamma\theta$ then has the entries $2\gamma_p\theta_p$. Learning rate and momentum may not differ,
    because a symmetry that joins parameters of different learning rates conserves another charge.

    Args:
        lr: Learning rate, positive.
        batch_size: Examples per step, $S$.
        weight_decay: As in `torch.optim.SGD`, that is $2\gamma$: a number, or a number for each parameter by name. A
            mapping has to name every parameter on which a symmetry acts. A parameter without a name in it counts as not
            trained.
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

        No weight decay on the bias:

        >>> sgd = nf.SGD(lr=0.1, batch_size=10, weight_decay={"weight": 0.02, "bias": 0.0})
        >>> sgd.gamma_of("weight"), sgd.gamma_of("bias")
        (0.01, 0.0)

    Source: Ziyin, Wang, Li, Wu (2024), section 3; the minibatch factor is that of sampling from a finite population.
    """

    lr: float
    batch_size: int
    weight_decay: float | Mapping[str, float] = 0.0
    momentum: float = 0.0
    replacement: bool = True
    dataset_size: int | None = None

    def __post_init__(self) -> None:
        _require(self.lr, "lr", "a finite number above 0", lambda lr: 0 < lr < float("inf"))
        _require(self.batch_size, "batch_size", "a whole number, 1 or more", lambda n: n == int(n) and n >= 1)
        for place, decay in entries_of(self.weight_decay).items():
            _require(decay, place, "a finite number, 0 or more", lambda w: 0 <= w < float("inf"))
        if isinstance(self.weight_decay, Mapping) and not isinstance(self.weight_decay, DecayByTensor):
            object.__setattr__(self, "weight_decay", dict(self.weight_decay))  # the user may change theirs
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

    def __hash__(self) -> int:
        # Without the weight decay, which may be a dictionary.
        return hash((self.lr, self.batch_size, self.momentum, self.replacement, self.dataset_size))

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
        if not isinstance(self.weight_decay, Mapping):
            return self.gamma
        if name not in self.weight_decay:
            raise SettingsError(
                f"the parameter {name!r} has no weight decay: weight_decay names {sorted(self.weight_decay)}. If SGD "
                "trains the parameter, name it there (0.0 for no decay), or add it to a parameter group of the "
                "optimizer; if not, call requires_grad_(False) on it, so that no symmetry moves it"
            )
        return self.weight_decay[name] / 2

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
        decay = by_names(self.weight_decay, params)
        return self if decay is self.weight_decay else replace(self, weight_decay=decay)

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
        model: nn.Module | None = None,
        replacement: bool = True,
        dataset_size: int | None = None,
    ) -> "SGD":
        """Read the settings of a `torch.optim.SGD`.

        Args:
            optimizer: The optimizer that trains the model. Only the weight decay may differ between its parameter
                groups.
            batch_size: Examples per step, which an optimizer does not know.
            model: The model that gives parameters their names, where weight decay differs. Without it the names are
                those from which the optimizer was made, `torch.optim.SGD(model.named_parameters(), ...)`; if it was
                made from tensors, the names are those of the model with which the settings are used.
            replacement: See the class.
            dataset_size: See the class.

        Returns:
            The settings, ready for `drift` and `solve_equilibrium`.

        Raises:
            SettingsError: If it is another optimizer, uses dampening or maximises, if its groups differ in learning
                rate or momentum, or if it holds no parameter of the model.

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
        groups = [group for group in optimizer.param_groups if group["params"]] or optimizer.param_groups
        if any(number(group["dampening"]) or group["maximize"] for group in groups):
            raise SettingsError(
                "dampening and maximize change the meaning of a step: use dampening=0 and maximize=False"
            )
        return cls(
            lr=_shared(groups, "lr"),
            batch_size=batch_size,
            weight_decay=of_groups(groups, model),
            momentum=_shared(groups, "momentum"),
            replacement=replacement,
            dataset_size=dataset_size,
        )


def require_settings(sgd: object, params: nn.Module | Params | None = None) -> SGD:
    """The argument `sgd` of a public function, checked, with the weight decay by the names of the parameters.

    Args:
        sgd: The argument.
        params: The model, or its tensors by name; None leaves the weight decay as it is.

    Returns:
        The settings.

    Raises:
        SettingsError: If the argument is not an `SGD`, or as `named_by` does.
    """
    if isinstance(sgd, SGD):
        return sgd if params is None else sgd.named_by(params)
    if isinstance(sgd, torch.optim.Optimizer):
        raise SettingsError(
            f"expected nf.SGD, the settings of SGD, got the optimizer torch.optim.{type(sgd).__name__}, which does not "
            "know the batch size: give nf.SGD.from_optimizer(optimizer, batch_size=...)"
        )
    raise SettingsError(
        f"expected nf.SGD, the settings of SGD, got {type(sgd).__name__}: give nf.SGD(lr=..., batch_size=...)"
    )


def _shared(groups: Sequence[Mapping[str, Any]], name: str) -> Any:
    """A setting in which parameter groups must not differ."""
    values = [number(group[name]) for group in groups]
    if any(value != values[0] for value in values):
        raise SettingsError(
            f"all parameter groups must share {name}, got {values}: a symmetry that joins parameters of different "
            f"{name} conserves another charge. Give every group the same {name}; for symmetries within a single group, "
            "give nf.SGD(...) the settings of that group, and restrict the noise with noise.select(...)"
        )
    return values[0]


def _require(value: Any, name: str, expected: str, holds: Callable[[Any], bool]) -> None:
    try:
        good = bool(holds(value))
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good:
        raise SettingsError(f"{name} must be {expected}, got {value!r}")
