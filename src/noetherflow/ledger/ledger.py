"""An account of the charges during training, for any optimizer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from noetherflow._drift import drift
from noetherflow._errors import SettingsError
from noetherflow._table import Table
from noetherflow.ledger import saved
from noetherflow.ledger.decay import DecayKind
from noetherflow.ledger.parts import ChargeParts
from noetherflow.ledger.split import Split, Splitter
from noetherflow.ledger.table import charge_table, flat_metrics
from noetherflow.ledger.tracked import Tracked
from noetherflow.noise import MicrobatchMeter, NoiseMeter, NoiseMoments
from noetherflow.noise.step import StepNoise
from noetherflow.optimizers import SGD
from noetherflow.optimizers.checks import require
from noetherflow.symmetry import Symmetry


@final
class ChargeLedger:
    r"""Says where the charge of every symmetry goes during training, exactly, for any optimizer.

    Put `optimizer.step()` into `with account.step()`. A step moves the parameters $\theta$ by $d = u + r$, where
    $u = -c\,\theta$ is weight decay. With the charge C and its bilinear form B,

    $$C(\theta + d) - C(\theta) = \underbrace{2B(\theta,u) + C(u)}_{\text{decay}} +
    \underbrace{2B(\theta + u, r)}_{\text{broken}} + \underbrace{C(r)}_{\text{noise + mean}} ,$$

    an identity up to rounding. All of it is computed in float64 from copies of the parameters.

    - `decay`: weight decay.
    - `broken`: by how much the optimizer itself breaks the symmetry. It is zero for SGD without momentum, if all
      parameters of the symmetry share learning rate and weight decay. With momentum the step carries gradients of
      earlier parameters, which are not orthogonal to the orbit of the present ones: there `broken` holds what momentum
      makes of the noise of earlier steps, and is as large as the kicks. Rounding of parameters in float32 or bfloat16
      is in it too.
    - `noise`: the estimated kick of the gradient noise, $\mathrm{Tr}[A\hat\Sigma A\,Q]/N$ with the scatter
      $\hat\Sigma$ of the N examples of the step. A multiplies the gradient of each parameter W by the number $a_W$ for
      which $-a_W\,\bar g_W$ is the step along the measured mean gradient; for SGD that is all of the step, clipping
      included. For other optimizers the estimate leaves out what they do to single entries.
    - `mean`: $C(r)$ less `noise`; for SGD an unbiased estimate of $\mathrm{lr}^2\,C(\nabla L)$.
    - `kick`: $C(r)$ of steps in which no meter measured the noise, so that it is not known which part is noise.
    - `between`: the change outside of the steps that are split: with `every`, in the steps between them.

    Weight decay is read from the parameter groups at each step. For SGD with momentum $\mu$ and dampening $\tau$ it is
    $c = \mathrm{lr}\,\lambda\,(1-\tau)/(1-\mu)$, the decay to which a step leads once the momentum buffer has forgotten
    it, so that `decay` adds up to that of the slow dynamics. Weight decay that passes through the preconditioner of an
    adaptive optimizer cannot be told apart and is part of `broken`; a note below the table says so.

    Symmetries may act on frozen parameters, which just do not move. Parameters sharded by FSDP2 are gathered, on all
    ranks together. A split step works in float64 on copies of the parameters on which symmetries act, which takes the
    time of several plain steps on small batches: give `every`. Between split steps nothing is computed.

    Args:
        model: The model that is trained.
        symmetries: By name.
        optimizer: Its optimizer, or several optimizers that step in a single block.
        every: Split the first step of each `every` steps.
        meter: A `NoiseMeter` or `MicrobatchMeter` that measures the gradients of a step, all of them in a single
            block `with meter.step(...)`. If the gradient of a step is no multiple of the mean gradient that was
            measured, as under accumulation in several blocks or clipping by tensor, the noise is not known. On several
            ranks it has to be a `MicrobatchMeter` with their group.
        decay: How weight decay acts, for optimizers outside of `torch.optim`: "decoupled" multiplies parameters by
            1 - lr * weight_decay, "coupled" adds it to the gradient. None tells by the class of the optimizer.

    Attributes:
        steps: How many steps were made.
        split_steps: How many of them were split.
        measured_steps: In how many of these the noise of at least one symmetry is known.
        skipped: In how many split steps no parameter moved, as when a gradient scaler skips a step.
        last: The `ChargeParts` of the last split step, by symmetry.

    Raises:
        SettingsError: If there is no symmetry, if the optimizer holds no parameter on which a symmetry acts, if it
            is not known how it applies weight decay, or if a symmetry acts on complex parameters.
        ParameterNameError: If a symmetry names a parameter that the model does not have.
        NotASymmetryError: If a charge is no quadratic form.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> batches = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(3)]
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> symmetries = nf.find_symmetries(net, loss, batches[0])
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.01)
        >>> meter = nf.NoiseMeter(net, symmetries)
        >>> account = nf.ChargeLedger(net, symmetries, optimizer, meter=meter)
        >>> for batch in batches:
        ...     optimizer.zero_grad()
        ...     with meter.step(batch):
        ...         loss(net, batch).mean().backward()
        ...     with account.step():
        ...         optimizer.step()
        >>> account.totals["0 -> 2"].noise.shape
        torch.Size([3])
        >>> sorted(account.metrics())[:3]
        ['charge/0 -> 2', 'charge_between/0 -> 2', 'charge_broken/0 -> 2']

    Source: Ziyin et al. (2024) for the charges and their drift; the split for any optimizer is this package's own.
    """

    def __init__(
        self,
        model: nn.Module,
        symmetries: Mapping[str, Symmetry],
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        every: int = 1,
        meter: NoiseMeter | MicrobatchMeter | None = None,
        decay: DecayKind | None = None,
    ) -> None:
        require(every, "every", "a whole number of steps, 1 or more", lambda n: n == int(n) and n >= 1)
        require(meter, "meter", "a NoiseMeter, a MicrobatchMeter such as watch.meter, or None", _is_meter)
        optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer or ())
        self._model, self._every, self._meter = model, every, meter
        self._tracked = Tracked(model, symmetries)
        self._splitter = Splitter(model, self._tracked, optimizers, decay)
        self._arrived: StepNoise | None = None
        self._arrivals = 0
        if meter is not None:
            meter.observers.append(self._arrive)
        self.reset()

    def reset(self) -> None:
        """Begin a new account at the present parameters."""
        self._at = self.charges
        self._totals = {name: ChargeParts.zeros(charge) for name, charge in self._at.items()}
        self.last: dict[str, ChargeParts] = {}
        self.steps = self.split_steps = self.measured_steps = self.skipped = 0

    @property
    def symmetries(self) -> dict[str, Symmetry]:
        """The symmetries, with the names of `model.named_parameters()`."""
        return dict(self._tracked.symmetries)

    @property
    def due(self) -> bool:
        """Whether the next step will be split: in other steps the noise need not be measured."""
        return self.steps % self._every == 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """The block in which the optimizer makes one step; if it raises, the account stays as it was.

        Yields:
            Nothing.

        Raises:
            NonFiniteError: If a parameter holds NaN or infinity after the step. The account stays as it was.
        """
        try:
            if self.due:
                before = self._splitter.before()
                yield
                unmeasured = self._meter.unmeasured if isinstance(self._meter, NoiseMeter) else {}
                self._book(self._splitter.after(before, self._arrived, unmeasured))
            else:
                yield
            self.steps += 1
        finally:
            # Gradients that were measured belong to this step, and to no later step.
            self._arrived, self._arrivals = None, 0

    @property
    def charges(self) -> dict[str, Tensor]:
        """The present charges by symmetry, float64, on the CPU."""
        return self._tracked.charges(self._tracked.theta())

    @property
    def totals(self) -> dict[str, ChargeParts]:
        """By symmetry, all changes since the account began, up to the present parameters, and their parts."""
        return self._totals_at(self.charges)

    def metrics(self) -> dict[str, float]:
        """The present charges and the parts of their changes so far, as a flat dictionary for a logger.

        Returns:
            For each symmetry S, `charge/S` and `charge_change/S`, `charge_decay/S`, `charge_noise/S`, `charge_mean/S`,
            `charge_kick/S`, `charge_broken/S`, `charge_between/S`: sums over coordinates, or traces of matrices.
        """
        charges = self.charges
        return flat_metrics(self.symmetries, charges, self._totals_at(charges))

    def compare(self, noise: NoiseMoments, settings: SGD) -> dict[str, tuple[Tensor, Tensor]]:
        """The mean change of the charges per step so far, and what `drift` says of it.

        The drift is that of the noise given, at the present parameters. `reset` begins a new account, so that the
        parameters of the account are close to the present ones.

        Args:
            noise: The noise: `meter.noise`, or that of `estimate_noise`.
            settings: The settings of SGD, with a single learning rate.

        Returns:
            For each symmetry of both, two tensors of the shape of the charge: measured and predicted, per step.

        Raises:
            SettingsError: If no step was made, if no symmetry is common, or if the settings are those of an optimizer
                which conserves another charge.
        """
        if not isinstance(settings, SGD) or isinstance(settings.lr, Mapping):
            raise SettingsError(
                "the drift is that of the charges of this account only under SGD with a single learning rate, got "
                f"{settings!r}: other optimizers conserve charges weighted by step sizes"
            )
        names = [name for name in self.symmetries if name in noise.symmetries]
        if not names or not self.steps:
            raise SettingsError(
                f"nothing to compare after {self.steps} steps: the account has the symmetries {list(self.symmetries)}, "
                f"and the noise {list(noise.symmetries)}"
            )
        rates, totals = drift(noise.select(*names), settings, self._model), self.totals
        return {name: (totals[name].change / self.steps, settings.effective_lr * rates[name]) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """The account as numbers and copies of tensors, for a checkpoint."""
        counts = {name: getattr(self, name) for name in saved.COUNTS}
        return saved.packed(counts, self._at, self._totals, self.last)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the account of a checkpoint; what the parameters have changed since then goes to `between`.

        Args:
            state: From `state_dict`, of an account of these symmetries.

        Raises:
            SettingsError: If it is the state of an account of other symmetries, or no such state.
        """
        counts, at, totals, last = saved.unpacked(state, self._at)
        self._at, self._totals, self.last = at, totals, last
        for name, count in counts.items():
            setattr(self, name, count)

    def __str__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> Table:
        charges = self.charges
        title = (
            f"Charges after {self.steps:,} steps: {self.split_steps:,} split, {self.measured_steps:,} with noise, "
            f"{self.skipped:,} skipped"
        )
        return charge_table(title, self.symmetries, charges, self._totals_at(charges), self._splitter.notes)

    def _arrive(self, noise: StepNoise) -> None:
        if self.due:
            self._arrivals += 1
            # Of several nothing is used, and each may be as large as the model.
            self._arrived = noise if self._arrivals == 1 else None

    def _totals_at(self, charges: Mapping[str, Tensor]) -> dict[str, ChargeParts]:
        return {name: parts.plus(_outside(charges[name] - self._at[name])) for name, parts in self._totals.items()}

    def _book(self, step: Split) -> None:
        """Add a split step to the account, with what has changed since the split step before."""
        self.last = {
            name: parts.plus(_outside(step.start[name] - self._at[name])) for name, parts in step.parts.items()
        }
        self._totals = {name: parts.plus(self.last[name]) for name, parts in self._totals.items()}
        self._at = step.end
        self.split_steps += 1
        self.skipped += not step.moved
        self.measured_steps += step.measured


def _is_meter(meter: object) -> bool:
    return meter is None or isinstance(meter, NoiseMeter | MicrobatchMeter)


def _outside(change: Tensor) -> ChargeParts:
    """A change outside of split steps."""
    zero = torch.zeros_like(change)
    return ChargeParts(change, zero, zero, zero, zero, zero, change)
