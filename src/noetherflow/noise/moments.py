"""What the symmetries need to know of the gradient noise."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, final

import torch
from torch import Tensor

from noetherflow import _store
from noetherflow._device import joined
from noetherflow._errors import EmptyDataError, ParameterNameError, SettingsError
from noetherflow._table import html_of, text_of
from noetherflow._types import Params
from noetherflow.noise.consistency import require_consistent
from noetherflow.noise.statistics import names_with_variances
from noetherflow.noise.table import tables_of
from noetherflow.symmetry import Grams, Symmetry


class StandardErrors(NamedTuple):
    """Of N_+, of N_- and of their difference: of the charge's shape, or of its diagonal's."""

    plus: Tensor
    minus: Tensor
    net: Tensor


class Spread(NamedTuple):
    """Sums over examples of each half of a charge and of their difference, and of the squares: shape (3, ...)."""

    total: Tensor
    squares: Tensor

    def merge(self, other: "Spread") -> "Spread":
        """The sums over both sets of examples."""
        return Spread(self.total + other.total, self.squares + other.squares)

    def standard_errors(self, count: int) -> StandardErrors:
        """Of the means; NaN for a single example."""
        if count < 2:
            return StandardErrors(*torch.full_like(self.total, torch.nan))
        variance = (self.squares - self.total.square() / count) / (count - 1)
        return StandardErrors(*(variance.clamp_min(0) / count).sqrt())


@final
@dataclass(frozen=True)
class NoiseMoments:
    r"""The centred second moments of per-example gradients, as far as the symmetries need them.

    With $\Sigma = E[g g^T] - E[g]\,E[g]^T$ the covariance of the gradient of one example (the data set being the
    population), it holds $N_\pm = E[C_\pm(g)] - C_\pm(E g)$ for every symmetry, so that
    $\mathrm{Tr}[\Sigma Q] = N_+ - N_-$; the mean gradient; and the variances of single parameters. Everything is
    float64.

    Args:
        count: Number of examples seen.
        mean: The mean gradient by parameter name.
        scatter: Per symmetry, the sum over examples of the Grams of the centred gradient.
        square_scatter: Per parameter on which a scaling or rescaling acts, the sum of squares of the centred gradient,
            entry by entry.
        total_scatter: The sum of squares of the centred gradient over all parameters, shape ().
        spreads: Per symmetry, sums of every example's contribution to plus, minus and their difference, for the
            standard errors.
        symmetries: The symmetries it was measured for, with parameters under their canonical names.
        fallback: The parameters whose gradients had to be formed example by example although a quicker way was wanted,
            each with the reason.
        unmeasured: The parameters whose gradients could not be taken apart by example in a training step, each with the
            reason. Symmetries that act on such parameters are left out, and there is no total.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> into, out_of = [nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], [nf.Axis("2.weight", 1)]
        >>> hidden = nf.DiagonalSymmetry(into, out_of)
        >>> batches = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(3)]
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> noise = nf.estimate_noise(net, loss, batches, {"hidden": hidden})
        >>> noise.count, noise.grams["hidden"].plus.shape
        (24, torch.Size([3]))

    Source: Ziyin et al. (2024), section 3; merging is the pairwise update of Chan, Golub, LeVeque (1979).
    """

    count: int
    mean: dict[str, Tensor]
    scatter: dict[str, Grams]
    square_scatter: dict[str, Tensor]
    total_scatter: Tensor
    spreads: dict[str, Spread] = field(repr=False)
    symmetries: dict[str, Symmetry]
    fallback: dict[str, str] = field(default_factory=dict)
    unmeasured: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, gradients: Params, symmetries: Mapping[str, Symmetry], *, reference: Params | None = None
    ) -> "NoiseMoments":
        """The moments of a stack of per-example gradients, of shape (B, *parameter shape) by name.

        Args:
            gradients: The stack, of any floating-point dtype.
            symmetries: What to measure.
            reference: The best known mean gradient, about which the standard errors are taken; the stack's own by
                default.

        Returns:
            The moments of these examples alone, to be merged with others.
        """
        stack = {name: tensor.detach().to(torch.float64) for name, tensor in gradients.items()}
        count = len(next(iter(stack.values())))
        mean = {name: tensor.mean(0) for name, tensor in stack.items()}
        centred = {name: tensor - mean[name] for name, tensor in stack.items()}
        about = centred if reference is None else {name: tensor - reference[name] for name, tensor in stack.items()}
        return cls(
            count=count,
            mean=mean,
            scatter={name: symmetry.grams(centred, batched=True) for name, symmetry in symmetries.items()},
            square_scatter={name: centred[name].square().sum(0) for name in names_with_variances(symmetries)},
            total_scatter=torch.stack(joined(tensor.square().sum() for tensor in centred.values())).sum(),
            spreads={name: _spread(symmetry.example_charges(about)) for name, symmetry in symmetries.items()},
            symmetries=dict(symmetries),
        )

    def merge(self, other: "NoiseMoments") -> "NoiseMoments":
        """The moments of both sets of examples together, exactly: batches, shards and ranks commute.

        Args:
            other: Moments of other examples at the same parameters, for the same symmetries.

        Returns:
            The combined moments.

        Raises:
            ParameterNameError: If the two were not measured for the same parameters and symmetries.
        """
        if self.mean.keys() != other.mean.keys() or self.symmetries != other.symmetries:
            raise ParameterNameError(
                "moments can be merged only if they were measured for the same parameters and symmetries: "
                f"{self.symmetries} over {sorted(self.mean)}, and {other.symmetries} over {sorted(other.mean)}"
            )
        count = self.count + other.count
        gap = {name: other.mean[name] - mean for name, mean in self.mean.items()}
        weight = self.count * other.count / count
        scatter = {}
        for name, symmetry in self.symmetries.items():
            between = symmetry.grams(gap)
            sides = zip(self.scatter[name], other.scatter[name], between, strict=True)
            scatter[name] = Grams(*(mine + theirs + weight * square for mine, theirs, square in sides))
        return replace(
            self,
            count=count,
            mean={name: mean + gap[name] * (other.count / count) for name, mean in self.mean.items()},
            scatter=scatter,
            square_scatter={
                name: mine + other.square_scatter[name] + weight * gap[name].square()
                for name, mine in self.square_scatter.items()
            },
            total_scatter=self.total_scatter
            + other.total_scatter
            + weight * torch.stack(joined(difference.square().sum() for difference in gap.values())).sum(),
            spreads={name: spread.merge(other.spreads[name]) for name, spread in self.spreads.items()},
            fallback=self.fallback | other.fallback,
            unmeasured=self.unmeasured | other.unmeasured,
        )

    def cpu(self) -> "NoiseMoments":
        """The moments on the CPU, where drifts and equilibria are computed."""
        return replace(
            self,
            mean={name: tensor.cpu() for name, tensor in self.mean.items()},
            scatter={name: Grams(*(side.cpu() for side in sides)) for name, sides in self.scatter.items()},
            square_scatter={name: tensor.cpu() for name, tensor in self.square_scatter.items()},
            total_scatter=self.total_scatter.cpu(),
            spreads={name: Spread(*(side.cpu() for side in sides)) for name, sides in self.spreads.items()},
        )

    @property
    def grams(self) -> dict[str, Grams]:
        r"""Per symmetry $N_+$ and $N_-$, per example: shape (), (n,), (n, n), or one entry per eigenvalue."""
        return {name: Grams(*(side / self.count for side in sides)) for name, sides in self.scatter.items()}

    @property
    def variance(self) -> dict[str, Tensor]:
        """The variance of every entry of the parameters on which scalings and rescalings act, per example."""
        return {name: square / self.count for name, square in self.square_scatter.items()}

    @property
    def trace(self) -> Tensor:
        r"""$\mathrm{Tr}\,\Sigma$ over all parameters that were trained, per example, shape ().

        Raises:
            SettingsError: If the noise of a parameter was not measured.
        """
        if self.unmeasured:
            listing = "; ".join(f"{name} ({cause})" for name, cause in self.unmeasured.items())
            raise SettingsError(
                "the total noise is not known, because the gradients of these parameters cannot be taken apart by "
                f"example in passing: {listing}. Use estimate_noise, which forms them one by one"
            )
        return self.total_scatter / self.count

    @property
    def standard_errors(self) -> dict[str, StandardErrors]:
        """Per symmetry, the standard errors of N_+, N_- and their difference (diagonals, for matrices).

        They say how far another sample of this size would fall from this one; for a data set seen whole, treat it as a
        sample of its source.
        """
        return {name: spread.standard_errors(self.count) for name, spread in self.spreads.items()}

    def require_variances(self) -> None:
        """Raise unless the variances that the equilibrium needs were measured.

        Raises:
            SettingsError: If the variances of a parameter on which a scaling or rescaling acts are missing.
        """
        missing = [name for name in names_with_variances(self.symmetries) if name not in self.square_scatter]
        if missing:
            raise SettingsError(
                f"the noise was measured without the variances of {missing}, which the equilibrium needs: "
                "use estimate_noise, or NoiseMeter(..., variances=True)"
            )

    def require_examples(self) -> None:
        """Raise unless at least one example was measured.

        Raises:
            EmptyDataError: If the moments hold no examples.
        """
        if self.count == 0:
            raise EmptyDataError("the noise moments hold no examples: measure at least one batch")

    def select(self, *names: str) -> "NoiseMoments":
        """The moments restricted to some of the symmetries for which they were measured.

        Args:
            names: The symmetries to keep, by name.

        Returns:
            The moments of the same examples, with these symmetries alone, in the order given.

        Raises:
            ParameterNameError: If the noise was not measured for a symmetry of that name.
        """
        missing = [name for name in names if name not in self.symmetries]
        if missing:
            raise ParameterNameError(f"no noise was measured for {missing}, only for {sorted(self.symmetries)}")
        kept: dict[str, Symmetry] = {name: self.symmetries[name] for name in names}
        return replace(
            self,
            symmetries=kept,
            scatter={name: self.scatter[name] for name in kept},
            spreads={name: self.spreads[name] for name in kept},
        )

    def save(self, path: str | Path) -> None:
        """Write the moments to a file (safetensors and JSON, no pickle), completely or not at all.

        Args:
            path: The file, by custom `*.safetensors`.

        Raises:
            FileError: If the file cannot be written.
        """
        _store.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> "NoiseMoments":
        """Read moments that `save` wrote, equal to the last bit; merge them with those of other processes.

        Args:
            path: The file.

        Returns:
            The moments, on the CPU.

        Raises:
            FileError: If the file is missing, damaged, or holds something else.
        """
        return _store.load(cls, path, require_consistent)

    def __str__(self) -> str:
        return text_of(tables_of(self))

    def _repr_html_(self) -> str:
        return html_of(tables_of(self))


def _spread(charges: Grams) -> Spread:
    kinds = torch.stack([charges.plus, charges.minus, charges.plus - charges.minus])
    return Spread(kinds.sum(1), kinds.square().sum(1))
