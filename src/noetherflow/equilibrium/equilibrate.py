"""The equilibrium of any set of symmetries: measure, solve block by block, move, measure again."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from noetherflow._types import Batch, Loss
from noetherflow.equilibrium.result import Equilibrium
from noetherflow.equilibrium.search import Options, search
from noetherflow.optimizers import Optimizer
from noetherflow.symmetry import Symmetry


def equilibrate(
    model: nn.Module,
    loss: Loss,
    loader: Iterable[Batch],
    settings: Optimizer,
    symmetries: Mapping[str, Symmetry] | None = None,
    *,
    tolerance: float = 1e-6,
    max_passes: int = 40,
    microbatches: bool = False,
    holdout: Iterable[Batch] | None = None,
    dtype: torch.dtype | None = None,
    max_bytes: int | None = None,
    progress: bool = True,
) -> Equilibrium:
    r"""Find the noise equilibrium of a model, whatever its symmetries, by measuring the noise along the way.

    The potential $\Phi(x) = 2\gamma|\theta_x|^2 + \sigma^2\,\mathrm{Tr}\,\Sigma(\theta_x)$ is convex along every
    symmetry. Where symmetries share no entry of a tensor, or all of them scale entries, the noise at a single point
    determines $\Phi$ on the orbit; see `solve_equilibrium`. Elsewhere (the gain of a norm against the heads that read
    the norm, consecutive linear layers, LoRA on attention) every block of symmetries is solved by itself, all blocks
    are moved, and the noise is measured again at the new point, with Anderson acceleration between passes. A step that
    raises the measured potential is halved. The last measurement proves the end point.

    Args:
        model: The model, in the mode in which it trains. It is not changed: the search runs on a copy in float64.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        loader: Batches of the training data. They are kept in memory, since every pass measures the same examples; give
            a part of a large data set.
        settings: The settings of the optimizer, `SGD` or `AdamW`.
        symmetries: By name; None finds them on the first batch, and leaves out those that act on parameters which no
            gradient reaches.
        tolerance: The drift of every coordinate is reduced to this share of its start.
        max_passes: The largest number of measurements on the way. Standard errors take a further measurement.
        microbatches: Measure the noise between the batches of the loader instead of between examples, as
            `MicrobatchMeter` does: for BatchNorm in train mode and for losses that couple the examples of a batch. Give
            batches as large as those of a training step, and many of them.
        holdout: Batches that are not used; `Equilibrium.holdout` says how far the equilibrium carries over to them.
        dtype: Floating-point type of the gradients; by default float64, or the model's type if the model is very large
            or cannot be computed in float64. Statistics and solver are float64.
        max_bytes: Memory that the search may take beyond the model and its activations; None sets no limit. A search
            that needs more is refused before it starts, with what would fit.
        progress: Show a progress bar on a terminal.

    Returns:
        The equilibrium. `passes` counts the measurements; `outcomes` says for every symmetry whether it came to rest,
        and if not, why; `standard_error` says how far the coordinates depend on the sample of data; `notes` says what
        was left out. Directions without an equilibrium stay where they are.

    Raises:
        SettingsError: If `tolerance` or `max_passes` is out of range, if the search needs more than `max_bytes`, or if
            the settings say nothing of a parameter on which a symmetry acts.
        EmptyDataError: If the loader yields nothing.
        CoupledExamplesError: If the loss couples examples, and `microbatches` is not set.
        NonFiniteError: If the loss overflows, here or at a later point; with the symmetry that moved most.
        NoetherflowError: For bad input, as `find_symmetries` and `estimate_noise` raise it.

    Examples:
        Three linear layers, whose rotations share the middle weight:

        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(3, 3, bias=False) for _ in range(3)))
        >>> batches = [(torch.randn(8, 3), torch.randn(8, 3)) for _ in range(4)]
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> equilibrium = nf.equilibrate(net, loss, batches, nf.SGD(lr=0.1, batch_size=8))
        >>> equilibrium.status.name, equilibrium.trace_after < equilibrium.trace_before
        ('CONVERGED', True)

    Source: Ziyin et al. (2024) for the equilibrium; Kempf and Ness (1979) for convexity along groups; Anderson (1965)
        for the acceleration. Their combination is this package's own.
    """
    options = Options(tolerance, max_passes, microbatches, holdout, dtype, max_bytes, progress)
    return search(model, loss, loader, settings, symmetries, options).equilibrium
