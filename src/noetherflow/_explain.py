"""The symmetries of a model with the reasons for those that it lacks, and symmetries that do not act along axes."""

import torch
from torch import Tensor, nn

from noetherflow._errors import NoetherflowError
from noetherflow._params import snapshot
from noetherflow._precision import TOLERANCES
from noetherflow._types import Batch, Loss
from noetherflow._verify import verify_symmetry
from noetherflow.detect import find
from noetherflow.detect.explanation import Explanation
from noetherflow.discover import Discovery, discover_generators
from noetherflow.discover.completeness import _matrices, _span
from noetherflow.symmetry import DenseSymmetry, Symmetry

# The search for generators of this many parameters takes about a second.
_MOST_PARAMETERS = 40
# Singular values and entries of orthonormal generators below this are rounding.
_ZERO = 1e-5

_NONE = "None: nf.discover_generators finds no symmetric generator outside the span of the symmetries above."
_LISTED = (
    "nf.discover_generators lists them. Those in off_axis can be declared: nf.analyze and nf.equilibrate take a dictionary "
    "of symmetries."
)
_LARGE = (
    f"Not searched for: the model has more than {_MOST_PARAMETERS} trainable parameters. nf.discover_generators (up to 80 "
    "parameters), nf.discover_blocks and nf.discover_rescalings search further."
)
_UNDECIDED = (
    "Undecided: nf.discover_generators cannot separate generators from rounding in this model. A smaller model of the "
    "architecture, or a batch with more examples, may tell."
)


def explain(
    model: nn.Module, loss: Loss, batch: Batch, *, approximate: bool = False, dtype: torch.dtype | None = None
) -> Explanation:
    r"""The symmetries of a model, their certificates, and for every axis without a symmetry the reason.

    The symmetries are those of `find_symmetries`. A model of at most 40 trainable parameters is also searched for
    symmetries that do not act along axes: symmetric matrices Q on all parameters $\theta$ with
    $\nabla\ell \cdot Q\theta = 0$ for every example, which are not in the span of the symmetries. An example is a weight
    $u^2 - v^2$, which a hyperbolic rotation in the plane of u and v leaves constant.

    Args:
        model: The model, in train or eval mode; dropout in train mode breaks symmetries. It is not changed.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        batch: Examples. Parameters that these examples do not reach have no symmetry.
        approximate: Include symmetries that are exact only up to the `eps` of a normalisation.
        dtype: Precision of the proofs; by default float64, or that of the model if it is very large.

    Returns:
        The explanation. Printing it prints tables in which rows of equal blocks are merged.

    Raises:
        TraceError: If the computation cannot be written as a graph.
        LossError: If the loss does not return one number per example.
        NonFiniteError: If a parameter or a loss is not finite.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
        >>> batch = torch.randn(8, 4), torch.randn(8, 1)
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> nf.explain(net, loss, batch).axes[0].reason
        'tanh (1)'

        Between two linear layers, matrices mix the hidden neurons: 6 symmetric generators for 3 neurons. If input and
        output have width 1, 3 more generators mix the weights of both layers.

        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 3, bias=False), torch.nn.Linear(3, 1, bias=False))
        >>> batch = torch.randn(8, 1), torch.randn(8, 1)
        >>> len(nf.explain(net, loss, batch).off_axis)
        3

    Source: the search is this package's own.
    """
    explanation = find.explain(model, loss, batch, approximate=approximate, dtype=dtype)
    generators, note = _off_axis(model, loss, batch, list(explanation.symmetries.values()))
    return Explanation(explanation.found, explanation.rejected, explanation.axes, generators, note)


def _off_axis(
    model: nn.Module, loss: Loss, batch: Batch, symmetries: list[Symmetry]
) -> tuple[tuple[DenseSymmetry, ...], str]:
    """Generators outside the span of symmetries, each verified, and a sentence on the search."""
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not size:
        return (), ""
    if size > _MOST_PARAMETERS:
        return (), _LARGE
    try:
        discovery = discover_generators(model, loss, batch, progress=False)
        if not discovery.decided:
            return (), _UNDECIDED
        params = {name: tensor for name, tensor in snapshot(model).items() if name in discovery.names}
        candidates = _generators(_outside(discovery, symmetries, params), params)
        residuals = [verify_symmetry(model, loss, batch, candidate) for candidate in candidates]
    except (NoetherflowError, RuntimeError) as error:
        # The symmetries along axes are known all the same, for example in a model that cannot be computed in float64.
        return (), f"Not searched for, because nf.discover_generators failed: {' '.join(str(error).split())}"
    if any(residual > TOLERANCES[residual.precision].proof for residual in residuals):
        return (), _UNDECIDED
    return tuple(candidates), _LISTED if candidates else _NONE


def _outside(discovery: Discovery, symmetries: list[Symmetry], params: dict[str, Tensor]) -> Tensor:
    """An orthonormal basis of the symmetric generators orthogonal to those of symmetries, shape (k, n, n)."""
    discovered = discovery.symmetric.flatten(1)
    matrices = [matrix for symmetry in symmetries for matrix in _matrices(symmetry, params)]
    if not matrices or not len(discovered):
        return discovery.symmetric
    # No gradient has a component along a dead direction, so a generator is known only up to those.
    size = discovery.symmetric.shape[-1]
    live = torch.eye(size, dtype=torch.float64) - discovery.dead.T @ discovery.dead
    known = _span(live @ torch.stack(matrices) @ live)
    # Coefficients of the discovered generators that are orthogonal to those of the known ones.
    coefficients = known @ discovered.T
    _, values, right = torch.linalg.svd(coefficients, full_matrices=True)
    return (right[int((values > _ZERO).sum()) :] @ discovered).reshape(-1, size, size)


def _generators(basis: Tensor, params: dict[str, Tensor]) -> list[DenseSymmetry]:
    """Generators that span what a basis of shape (k, n, n) spans, each on as few parameters as possible."""
    flat = basis.flatten(1)
    # Two entries of generators belong together if the projection on the space of generators connects them.
    connected = (flat.T @ flat).abs() > _ZERO
    pending = connected.diagonal().clone()
    generators = []
    while pending.any():
        group = torch.zeros_like(pending)
        group[pending.nonzero()[0]] = True
        while (larger := connected[group].any(0)).sum() > group.sum():
            group = larger
        pending &= ~group
        # The space is a direct sum over groups, so singular values are 0 or 1.
        _, values, vectors = torch.linalg.svd(flat * group, full_matrices=False)
        generators += [_restricted(vector.reshape(basis.shape[1:]), params) for vector in vectors[values > 0.5]]
    return generators


def _restricted(generator: Tensor, params: dict[str, Tensor]) -> DenseSymmetry:
    """A generator on the parameters that it moves."""
    names = [name for name, parameter in params.items() for _ in range(parameter.numel())]
    moved = {name for name, row in zip(names, generator.abs().amax(1) > _ZERO, strict=True) if row}
    kept = torch.tensor([name in moved for name in names])
    return DenseSymmetry(generator[kept][:, kept], [name for name in params if name in moved])
