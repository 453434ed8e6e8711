"""The symmetries of a model with the reasons for those that it lacks, and symmetries that do not act along axes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from noetherflow._model_function import ModelFunction
from noetherflow._precision import TOLERANCES
from noetherflow._types import Batch, Loss
from noetherflow._verify import verify_symmetry
from noetherflow.detect.explanation import Explanation
from noetherflow.detect.find import explain_axes
from noetherflow.discover import discover_generators
from noetherflow.discover.spans import beyond
from noetherflow.symmetry import DenseSymmetry, Symmetry

# The search for generators of this many parameters takes about a second.
_MOST_PARAMETERS = 32
# Singular values and entries of orthonormal generators below this are rounding.
_ZERO = 1e-5

_NONE = "None: nf.discover_generators finds no symmetric generator outside the span of the symmetries above."
_LISTED = (
    "nf.discover_generators lists them. Those in explanation.off_axis can be declared: nf.analyze and nf.equilibrate "
    "take a dictionary of symmetries."
)
_REFUTED = "Left out, because a loss changes at other values of parameters or buffers: {count}."
_LARGE = (
    "Only symmetries along axes were searched for. nf.discover_blocks, nf.discover_rescalings and, up to 80 "
    "parameters, nf.discover_generators search further."
)
_UNDECIDED = (
    "Undecided: nf.discover_generators cannot tell generators from rounding in this model. Try a smaller model of the "
    "same architecture, or a batch with more examples."
)
_FAILED = "Only symmetries along axes were searched for, because nf.discover_generators failed: "


def explain(
    model: nn.Module, loss: Loss, batch: Batch, *, approximate: bool = False, dtype: torch.dtype | None = None
) -> Explanation:
    r"""The symmetries of a model, their certificates, and for every axis without a symmetry the reason.

    The symmetries are those of `find_symmetries`. A model of at most 32 trainable parameters is also searched for
    symmetries that do not act along axes: symmetric matrices Q on all parameters $\theta$ with
    $\nabla\ell \cdot Q\theta = 0$ for every example, which are not in the span of the symmetries. For example, a
    hyperbolic rotation in the plane of u and v leaves a weight $u^2 - v^2$ constant.

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
    explanation = explain_axes(model, loss, batch, approximate=approximate, dtype=dtype)
    # Approximate symmetries are not generators, so they are in no span of generators.
    exact = [finding.symmetry for finding in explanation.found if not finding.small]
    generators, note = _off_axis(model, loss, batch, exact)
    return Explanation(explanation.found, explanation.rejected, explanation.axes, generators, note)


def _off_axis(
    model: nn.Module, loss: Loss, batch: Batch, symmetries: Sequence[Symmetry]
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
            return (), f"{_UNDECIDED} {discovery.note}".strip()
        params = ModelFunction(model, loss, torch.float64).trained
        generators = _generators(beyond(discovery, symmetries, params), params)
        proved = [generator for generator in generators if _is_proved(model, loss, batch, generator)]
    except Exception as error:
        # Code of a model may raise any exception for a single example, such as BatchNorm in train mode. The symmetries
        # along axes are known all the same.
        return (), _FAILED + " ".join(str(error).split())
    sentences = [_LISTED if proved else _NONE]
    if left_out := len(generators) - len(proved):
        sentences.append(_REFUTED.format(count=left_out))
    return tuple(proved), " ".join(sentences)


def _is_proved(model: nn.Module, loss: Loss, batch: Batch, symmetry: Symmetry) -> bool:
    """Whether the residual of a symmetry is rounding."""
    residual = verify_symmetry(model, loss, batch, symmetry)
    return residual <= TOLERANCES[residual.precision].proof


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
