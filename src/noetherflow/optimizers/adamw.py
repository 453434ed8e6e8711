"""AdamW and Adam: the settings, and the terms of the potential that the equilibrium minimises."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor, nn

from noetherflow._errors import SettingsError
from noetherflow._types import Params
from noetherflow.optimizers.base import Exponents, Optimizer, Terms, is_trained
from noetherflow.optimizers.by_parameter import Setting, by_names, kept, of_groups, value_of
from noetherflow.optimizers.checks import require, require_batches, require_setting, sampling_factor, shared
from noetherflow.optimizers.state import Source, adam_of, lr_of

Betas = tuple[float, float]


@final
@dataclass(frozen=True)
class AdamW(Optimizer):
    r"""The settings of AdamW, and what they mean for symmetries that scale entries.

    A step is $\theta' = (1 - \eta\lambda)\,\theta - \eta\,\hat m / (\sqrt{\hat v} + \epsilon)$ with the bias-corrected
    averages $\hat m$ of gradients and $\hat v$ of squares of gradients. For a fixed v and without average of gradients,
    the step sizes are $p = \eta / (\sqrt v + \epsilon)$, and the charge $C = \sum_i q_i \theta_i^2 / p_i$ of a diagonal
    generator becomes exactly

    $$C' = (1 - \eta\lambda)^2\,C + \sum_i q_i\,p_i\,g_i^2 ,$$

    since the gradient of every example is orthogonal to the orbit. With $v = E\,g_S^2$, the second moment of the
    gradient of a minibatch (the square of the mean included), the charge rests where

    $$\sum_i q_i \sqrt{v_i}\,(\eta_i - 2\lambda_i\theta_i^2) = 0 .$$

    Along the orbit $\sqrt v \to e^{-s}\sqrt v$, so that this point is the minimum of the convex potential
    $\Psi(x) = \sum_i \eta_i \sqrt{v_i}\,e^{-s_i(x)} + 2\lambda_i\sqrt{v_i}\,\theta_i^2\,e^{s_i(x)}$. The betas do not
    enter: they decide how fast v follows the parameters, about $1 / (1 - \beta_2)$ steps. Symmetries that mix entries
    have no charge under AdamW.

    Args:
        lr: Learning rate $\eta$, positive: a number, or a number for each parameter by name.
        betas: Decay rates of the averages of gradients and of squares of gradients: two numbers, or two for each
            parameter by name.
        eps: $\epsilon$. The equilibrium is that for $\sqrt v \gg \epsilon$; a note says where this does not hold.
        weight_decay: $\lambda$ as in `torch.optim.AdamW`: a number, or a number for each parameter by name. A mapping
            has to name every parameter on which a symmetry acts. A parameter without a name in it counts as not
            trained.
        decoupled: Whether the weight decay is applied to the parameters (AdamW) or added to the gradient (Adam with a
            penalty). In the second case the force $2\lambda\theta^2$ of the decay does not depend on v. That the
            gradient of the penalty enters v is neglected in noise from `estimate_noise`, and along the orbit.
        batch_size: Examples per step, $S$. It is needed with the noise of single examples, which `estimate_noise`
            measures, and not with `second_moments`.
        replacement: Whether the examples of a minibatch are drawn independently.
        dataset_size: Number of examples of the data set; needed (and used) only without replacement.

    Raises:
        SettingsError: If a setting is out of range.

    Examples:
        >>> import noetherflow as nf
        >>> adamw = nf.AdamW(lr=1e-3, weight_decay=0.1, batch_size=32)
        >>> adamw.decay_of("weight"), adamw.share
        (0.1, 0.03125)

    Source: the equilibrium is this package's own; the optimizer is that of Loshchilov and Hutter (2019).
    """

    lr: Setting = 1e-3
    betas: Betas | Mapping[str, Betas] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: Setting = 1e-2
    decoupled: bool = True
    batch_size: int | None = None
    replacement: bool = True
    dataset_size: int | None = None

    def __post_init__(self) -> None:
        require_setting(self.lr, "lr", "a finite number above 0", lambda lr: 0 < lr < math.inf)
        require_setting(self.weight_decay, "weight_decay", "a finite number, 0 or more", lambda w: 0 <= w < math.inf)
        require_setting(
            self.betas, "betas", "two numbers in [0, 1)", lambda pair: len(pair) == 2 and all(0 <= b < 1 for b in pair)
        )
        for name in ("lr", "weight_decay", "betas", "eps"):
            object.__setattr__(self, name, kept(getattr(self, name)))
        require(self.eps, "eps", "a finite number, 0 or more", lambda eps: 0 <= eps < math.inf)
        require(self.decoupled, "decoupled", "True or False", lambda value: isinstance(value, bool))
        require_batches(1 if self.batch_size is None else self.batch_size, self.replacement, self.dataset_size)

    def __hash__(self) -> int:
        # Without settings that may be dictionaries.
        return hash((self.eps, self.decoupled, self.batch_size, self.replacement, self.dataset_size))

    def decay_of(self, name: str) -> float:
        r"""The weight decay $\lambda$ of a parameter.

        Args:
            name: The name of the parameter, as in `named_parameters()`.

        Returns:
            The number.

        Raises:
            SettingsError: If the weight decay is given by parameter and does not name this parameter.
        """
        return value_of(self.weight_decay, name, "weight_decay")

    def betas_of(self, name: str) -> Betas:
        """The betas of a parameter.

        Args:
            name: The name of the parameter, as in `named_parameters()`.

        Returns:
            Both numbers.

        Raises:
            SettingsError: If the betas are given by parameter and do not name this parameter.
        """
        return value_of(self.betas, name, "betas")

    def lr_of(self, name: str) -> float:
        r"""The learning rate $\eta$ of a parameter.

        Args:
            name: The name of the parameter, as in `named_parameters()`.

        Returns:
            The number.

        Raises:
            SettingsError: If the learning rate is given by parameter and does not name this parameter.
        """
        return value_of(self.lr, name, "lr")

    @property
    def exponents(self) -> Exponents:
        r"""$\sqrt v$ falls as $e^{-s}$, and its product with squares of entries grows as $e^{s}$.

        A penalty that is added to the gradient has a force without $\sqrt v$, which grows as $e^{2s}$.
        """
        return Exponents(1 if self.decoupled else 2, 1, 1)

    @property
    def share(self) -> float | None:
        """The variance of a minibatch gradient over that of a single example; None without a batch size."""
        if self.batch_size is None:
            return None
        return sampling_factor(self.batch_size, self.replacement, self.dataset_size) / self.batch_size

    @property
    def with_mean(self) -> bool:
        """True: v is the second moment about zero."""
        return True

    @property
    def derived(self) -> dict[str, Any]:
        """Nothing: the step sizes depend on the gradients."""
        return {}

    def terms(self, name: str, theta: Tensor, moment: Tensor) -> Terms:
        r"""The terms of a parameter, without $\epsilon$.

        Args:
            name: The name of the parameter.
            theta: Its values.
            moment: v.

        Returns:
            $2\lambda\sqrt v\,\theta^2$ (for a penalty $\lambda\theta^2$), $\eta\sqrt v$ and $\sqrt v\,\theta^2/\eta$.
        """
        lr, decay, squares, root = self.lr_of(name), self.decay_of(name), theta.square(), moment.sqrt()
        shrinking = 2 * decay * root * squares if self.decoupled else decay * squares
        return Terms(shrinking, lr * root, root * squares / lr)

    def trains(self, name: str) -> bool:
        """Whether the settings hold for a parameter: a mapping leaves out what no parameter group holds."""
        return is_trained(name, self.lr, self.weight_decay, self.betas)

    def named_by(self, params: nn.Module | Params) -> "AdamW":
        """These settings with the names of the parameters of a model; see `SGD.named_by`.

        Args:
            params: The model, or its tensors by name.

        Returns:
            The settings.

        Raises:
            SettingsError: If the parameter groups hold no parameter of the model.
        """
        given: dict[str, Any] = {key: getattr(self, key) for key in ("lr", "weight_decay", "betas")}
        named: dict[str, Any] = {key: by_names(setting, params, key) for key, setting in given.items()}
        return self if all(named[key] is given[key] for key in given) else replace(self, **named)

    @classmethod
    def from_optimizer(
        cls,
        optimizer: Source,
        *,
        batch_size: int | None = None,
        model: nn.Module | None = None,
        names: Sequence[str] | None = None,
        lr: Setting | None = None,
        decoupled: bool | None = None,
        replacement: bool = True,
        dataset_size: int | None = None,
    ) -> "AdamW":
        """Read the settings of a `torch.optim.AdamW` or `Adam`.

        Args:
            optimizer: The optimizer that trains the model; or its state dict; or a file `optimizer.pt` that holds the
                state dict; or the folder of a checkpoint that `transformers.Trainer` wrote. Learning rate, betas and
                weight decay may differ between parameter groups.
            batch_size: Examples per step; see the class.
            model: The model that gives parameters their names, where settings differ. Without it the names are those
                from which the optimizer was made, or those of the model with which the settings are used.
            names: For a state dict: the names of the parameters in its order; see `second_moments`.
            lr: The learning rate instead of that of the optimizer. By default the present learning rate of every
                group, or the initial learning rate where a schedule has ended at 0.
            decoupled: Whether weight decay is decoupled, for a state dict from before PyTorch 2.7, which does not say.
            replacement: See the class.
            dataset_size: See the class.

        Returns:
            The settings.

        Raises:
            SettingsError: If it is another optimizer, uses amsgrad, or maximises; if its groups differ in eps or in
                the kind of weight decay; if it does not say a learning rate above 0; or if it does not belong to the
                model.
            FileError: If the file is missing, damaged, or holds something else.

        Examples:
            >>> import torch, noetherflow as nf
            >>> optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters(), lr=0.01, weight_decay=0.1)
            >>> nf.AdamW.from_optimizer(optimizer).weight_decay
            0.1
        """
        state = adam_of(optimizer, model, names)
        kind = decoupled if state.decoupled is None else state.decoupled
        if kind is None:
            raise SettingsError(
                "the state dict is from before PyTorch 2.7 and does not say whether it is that of AdamW or of Adam: "
                "give decoupled=True for AdamW, decoupled=False for Adam"
            )
        groups = state.groups if lr is not None else [{**group, "lr": lr_of(group)} for group in state.groups]
        return cls(
            lr=of_groups(groups, "lr", model) if lr is None else lr,
            betas=of_groups(groups, "betas", model),
            eps=shared(groups, "eps"),
            weight_decay=of_groups(groups, "weight_decay", model),
            decoupled=kind,
            batch_size=batch_size,
            replacement=replacement,
            dataset_size=dataset_size,
        )
