r"""Every rescaling of the entries of a model's parameters, numerically.

Multiply each entry $\theta_i$ by $e^{x w_i}$: a symmetry if $\sum_i w_i\, \theta_i \nabla_i\ell = 0$ for every example
at every $\theta$. In models of more than a few thousand parameters the exponents w of a tensor are sums over its axes,
$w_{ij} = r_i + c_j$: then the unknowns are its rows and columns, and the equations are made of the row and column sums
of $\theta \odot \nabla\ell$.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from noetherflow._errors import SettingsError
from noetherflow._types import Batch, Loss
from noetherflow.discover.equations import MOST_UNKNOWNS, Thresholds, enough, null_space, without
from noetherflow.discover.points import Points, Tensors
from noetherflow.discover.search import ROUNDING, Search, jump

# Up to this many parameters every entry has an exponent; beyond it, every row and column of a tensor.
MOST_ENTRIES = 2000


@final
@dataclass(frozen=True, eq=False)
class Rescalings:
    """All rescalings of a model.

    Args:
        exponents: For each parameter the exponents w of its entries in each rescaling, shape (k, *shape): the entries
            are multiplied by e^(x w). Every linear combination of the k rescalings is a rescaling.
        reached: For each parameter 1.0 where a gradient was not zero, else 0.0.
        gap: (largest singular value taken for zero, smallest taken for more), relative to the largest.
        decided: Whether the rescalings are established. If not, k is not to be trusted.
        note: Why the search is undecided, or which tensors were not drawn at random; empty if there is nothing to say.

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
    note: str = ""

    @property
    def count(self) -> int:
        """Number k of independent rescalings."""
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

    For models too large for `discover_generators`: every diagonal and every scalar symmetry has this form. Up to 2,000
    trainable parameters each entry has an exponent w; in larger models w is a sum over a tensor's axes. Rescalings of
    entries that no gradient ever reaches are left out. Points are drawn and solutions are tested as by
    `discover_generators`: the result is right or undecided.

    Args:
        model: The model: at most 2,000 trainable parameters, or 6,400 rows and columns of them. It is not changed.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        batch: The examples; integers (tokens, labels) stay as they are, so there should be many different examples.
        generator: Source of random numbers; by default a generator with seed 0.
        progress: Show a progress bar on a terminal.

    Returns:
        The rescalings.

    Raises:
        FrozenParameterError: If the model has no trainable parameter.
        SettingsError: If there are too many unknowns, or if a trainable parameter is complex.
        LossError: If the loss cannot be evaluated at random parameters.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(9, 20), torch.nn.ReLU(), torch.nn.Linear(20, 7))
        >>> batch = torch.randn(4, 9), torch.randn(4, 7)
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1)
        >>> nf.discover_rescalings(net, loss, batch).count
        20

    Source: this package's own.
    """
    points = Points(model, loss, batch, generator)
    layout = _entries if points.size <= MOST_ENTRIES else _sums
    unknowns = layout({name: torch.empty(1, *shape) for name, shape in points.shapes.items()}).shape[1]
    if unknowns > MOST_UNKNOWNS:
        raise SettingsError(
            f"the parameters of this model have {unknowns} rows and columns altogether, and discover_rescalings can "
            f"look at {MOST_UNKNOWNS}. Use nf.find_symmetries, or a smaller model of the same architecture"
        )
    products = _Products(layout, points.names)
    solution = Search(points, products, unknowns, "equations", progress).run()
    reached = products.reached
    # Exponents of entries without a gradient, and sums over axes that cancel, change no loss.
    params, _ = points.pretend(enough(unknowns))
    pretended = layout({name: tensor * reached[name] for name, tensor in params.items()})
    trivial = null_space(pretended.to("cpu", torch.float64), Thresholds.of(torch.float64)).vectors
    vectors = without(solution.vectors, trivial)
    exponents, start = {}, 0
    for name, shape in points.shapes.items():
        exponents[name] = torch.zeros(len(vectors), *shape, dtype=torch.float64)
        for form in [shape] if layout is _entries else _along_axes(shape):
            part = vectors[:, start : start + form.numel()]
            exponents[name] += part.reshape(-1, *form)
            start += form.numel()
        exponents[name] *= reached[name].cpu()
    undecided = solution.note or jump(points, len(vectors), lambda x, params: _move(exponents, x, params))
    return Rescalings(
        exponents,
        {name: tensor.to("cpu", torch.float64) for name, tensor in reached.items()},
        solution.gap,
        not undecided,
        "; ".join(filter(None, [undecided, points.note])),
    )


def _move(exponents: Tensors, coordinates: Tensor, params: Tensors) -> Tensors:
    """Parameters of shape (m, *parameter) after a rescaling of entries by e^w with w = sum_k x_k w_k, at most 1."""
    sums = {name: torch.tensordot(coordinates, exponent, 1) for name, exponent in exponents.items()}
    largest = max(float(exponent.abs().max()) for exponent in sums.values())
    factors = {name: (exponent / largest).exp() for name, exponent in sums.items()}
    return {name: tensor * factors[name].to(tensor) for name, tensor in params.items()}


@final
class _Products:
    """The equations: sums of theta_i g_i over entries of equal exponent; keeps which entries have gradients.

    Args:
        layout: The unknowns, as a function of products theta_i g_i of shape (m, *parameter).
        names: The parameters.
    """

    def __init__(self, layout: Callable[[Tensors], Tensor], names: tuple[str, ...]) -> None:
        self._layout = layout
        self._largest = dict.fromkeys(names, torch.zeros(()))

    def __call__(self, params: Tensors, gradients: Tensors) -> Tensor:
        """The rows, shape (m, unknowns)."""
        if len(next(iter(gradients.values()))):
            sizes = {name: gradient.abs() for name, gradient in gradients.items() if gradient.numel()}
            longest = torch.stack([size.reshape(len(size), -1).amax(1) for size in sizes.values()]).amax(0)
            for name, size in sizes.items():
                # Shares of the largest entry at each point: gradients of large parameters would hide all others.
                share = size / longest.clamp_min(torch.finfo(size.dtype).tiny).reshape(-1, *[1] * (size.ndim - 1))
                self._largest[name] = torch.maximum(self._largest[name].to(share), share.amax(0))
        return self._layout({name: params[name] * gradients[name] for name in params})

    @property
    def reached(self) -> Tensors:
        """For each parameter a mask of the entries with a gradient that is more than rounding."""
        return {name: tensor > ROUNDING for name, tensor in self._largest.items()}


def _entries(products: Tensors) -> Tensor:
    """Every entry, shape (m, entries)."""
    return torch.cat([product.reshape(len(product), math.prod(product.shape[1:])) for product in products.values()], 1)


def _sums(products: Tensors) -> Tensor:
    """The sums over all axes except one, for every tensor and each of its axes, shape (m, lengths of all axes)."""
    sums = [
        product.sum_to_size(len(product), *form).flatten(1)
        for product in products.values()
        for form in _along_axes(product.shape[1:])
    ]
    return torch.cat(sums, 1)


def _along_axes(shape: torch.Size) -> list[torch.Size]:
    """For each axis of a shape the shape of a tensor that varies along that axis only."""
    axes = range(max(1, len(shape)))
    return [torch.Size(length if other == dim else 1 for other, length in enumerate(shape)) for dim in axes]
