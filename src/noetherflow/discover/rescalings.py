r"""Every rescaling of the entries of a model's parameters, numerically.

Multiply each entry $\theta_i$ by $e^{x w_i}$: a symmetry if $\sum_i w_i\, \theta_i \nabla_i\ell = 0$ for every example
at every $\theta$. In models of more than a few thousand parameters the exponents w of a tensor are sums over its axes,
$w_{ij} = r_i + c_j$: then the unknowns are its rows and columns, and the equations are made of the row and column sums
of $\theta \odot \nabla\ell$.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from noetherflow._errors import SettingsError
from noetherflow._types import Batch, Loss
from noetherflow.discover.equations import MOST_UNKNOWNS, Draws, enough, null_space

_DEAD = 1e-9
# Up to so many parameters every entry has its own exponent.
MOST_ENTRIES = 2000


@final
@dataclass(frozen=True, eq=False)
class Rescalings:
    """All rescalings of a model.

    Args:
        exponents: For each parameter the exponents of its entries in each rescaling, shape (k, *shape): the entries are
            multiplied by e^(x exponent). Every combination of the k is one too.
        reached: For each parameter 1.0 where some gradient is not zero, else 0.0.
        gap: (largest singular value taken for zero, smallest taken for more), relative to the largest.
        decided: Whether the two are far apart; if not, k is not to be trusted.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> batch = torch.randn(4, 2), torch.randn(4, 2)
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1)
        >>> nf.discover_rescalings(net, loss, batch).exponents["2.weight"].shape
        torch.Size([3, 2, 3])
    """

    exponents: dict[str, Tensor]
    reached: dict[str, Tensor]
    gap: tuple[float, float]
    decided: bool

    @property
    def count(self) -> int:
        """How many independent ones there are."""
        return len(next(iter(self.exponents.values())))


def discover_rescalings(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    *,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> Rescalings:
    r"""All rescalings of the entries of parameters by $e^{x w}$.

    For models too large for `discover_generators`: every diagonal symmetry and every scalar one is of this form. Up to
    2,000 trainable parameters each entry has an exponent w of its own, beyond them w is a sum over a tensor's axes.
    What changes only entries that no gradient ever reaches is left out.

    Args:
        model: The model: at most 2,000 trainable parameters, or 6,400 rows and columns of them. It is not changed.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        batch: Some examples; integers (tokens, labels) stay as they are, so there should be many different ones.
        generator: Source of the draws; a fixed one by default.
        progress: Show a progress bar on a terminal.

    Returns:
        The rescalings.

    Raises:
        FrozenParameterError: If the model has no trainable parameter.
        SettingsError: If there are too many unknowns.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(9, 20), torch.nn.ReLU(), torch.nn.Linear(20, 7))
        >>> batch = torch.randn(4, 9), torch.randn(4, 7)
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1)
        >>> nf.discover_rescalings(net, loss, batch).count
        20

    Source: this package's own.
    """
    draws = Draws(model, loss, batch, generator)
    laid_out = _entries if draws.size <= MOST_ENTRIES else _sums
    unknowns = laid_out({name: torch.empty(1, *shape) for name, shape in draws.shapes.items()}).shape[1]
    if unknowns > MOST_UNKNOWNS:
        raise SettingsError(
            f"the parameters of this model have {unknowns} rows and columns altogether, and discover_rescalings can "
            f"look at {MOST_UNKNOWNS}. Use nf.find_symmetries, or a smaller model of the same architecture"
        )

    largest = dict.fromkeys(draws.names, torch.zeros(()))

    def products(params: dict[str, Tensor], gradients: dict[str, Tensor]) -> Tensor:
        for name, one in gradients.items():
            largest[name] = torch.maximum(largest[name], one.abs().amax(0))
        return laid_out({name: params[name] * gradients[name] for name in params})

    rows = draws.rows(enough(unknowns), products, "equations", progress)
    zero = _DEAD * max(float(one.max()) for one in largest.values())
    reached = {name: (one > zero).double() for name, one in largest.items()}

    def pretended(params: dict[str, Tensor], _: dict[str, Tensor]) -> Tensor:
        return laid_out({name: one * reached[name] for name, one in params.items()})

    trivial = null_space(draws.pretend(enough(unknowns), pretended)).vectors
    found = null_space(rows, trivial)
    exponents, start = {}, 0
    for name, shape in draws.shapes.items():
        exponents[name] = torch.zeros(len(found.vectors), *shape, dtype=torch.float64)
        for form in [shape] if laid_out is _entries else _along_axes(shape):
            one = found.vectors[:, start : start + form.numel()]
            exponents[name] += one.reshape(-1, *form)
            start += form.numel()
        exponents[name] *= reached[name]
    return Rescalings(exponents, reached, found.gap, found.decided)


def _entries(products: dict[str, Tensor]) -> Tensor:
    return torch.cat([one.flatten(1) for one in products.values()], 1)


def _sums(products: dict[str, Tensor]) -> Tensor:
    """The sums over everything but one axis, of every tensor and each of its axes."""
    found = []
    for one in products.values():
        for form in _along_axes(one.shape[1:]):
            found.append(one.sum_to_size(len(one), *form).flatten(1))
    return torch.cat(found, 1)


def _along_axes(shape: torch.Size) -> list[torch.Size]:
    """The shape of a tensor of that many dimensions that varies along one axis only, for each axis."""
    axes = range(max(1, len(shape)))
    return [torch.Size(length if other == dim else 1 for other, length in enumerate(shape)) for dim in axes]
