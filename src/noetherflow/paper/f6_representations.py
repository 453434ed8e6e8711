r"""F6: SGD aligns the gradient noise of two layers, not their norms.

Question: SGD makes the representations of two layers similar. Which matrices align: those of the noise,
$W \Sigma_x W^T$ and $U^T \Sigma_\epsilon U$, or those of the norms, $W W^T$ and $U^T U$?

Setting: a tanh network $U \tanh(W x)$ with inputs of small scale, where tanh is close to linear, a tanh teacher, and
label noise. Isotropic covariances make noise and norms proportional; anisotropic covariances distinguish them.

Formula: at the noise equilibrium of two linear layers
$W \Sigma_x W^T / \mathrm{Tr}\,\Sigma_x = U^T \Sigma_\epsilon U / \mathrm{Tr}\,\Sigma_\epsilon$. Gradient descent with
weight decay gives $W W^T = U^T U$. The measure is the cosine of two matrices after subtraction of their traces.

Falsified by: low alignment of the noise after SGD; for anisotropic data, alignment of the norms as high as that of the
noise; high alignment after gradient descent. Where tanh saturates the layers are not linear, and alignment must fall.

Source: Ziyin et al. (2024), figures 6 and 10.
"""

from typing import NamedTuple, final

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from noetherflow._types import Params
from noetherflow.optimizers import SGD
from noetherflow.paper import linear_pair, style
from noetherflow.paper.claim import Claim
from noetherflow.paper.f6_student import WORLDS, Config, Student, normal, start
from noetherflow.paper.measure import standard_error
from noetherflow.simulation import GradientDescent, simulate

TITLE = "Representations align: the noise, not the norms, of two layers becomes the same"


@final
class Ends(NamedTuple):
    r"""Matrices of the trained layers, each of shape (replicas, hidden, hidden).

    Args:
        noise_in: $W \Sigma_x W^T$.
        noise_out: $U^T \Sigma_\epsilon U$.
        norm_in: $W W^T$.
        norm_out: $U^T U$.
    """

    noise_in: Tensor
    noise_out: Tensor
    norm_in: Tensor
    norm_out: Tensor

    @property
    def noise_alignment(self) -> Tensor:
        """Cosine of `noise_in` and `noise_out` after subtraction of the traces, shape (replicas,)."""
        return alignment(self.noise_in, self.noise_out)

    @property
    def norm_alignment(self) -> Tensor:
        """Cosine of `norm_in` and `norm_out` after subtraction of the traces, shape (replicas,)."""
        return alignment(self.norm_in, self.norm_out)


@final
class Outcome(NamedTuple):
    """End points by kind of data (`WORLDS`) of SGD and of gradient descent; `saturated` is SGD with large inputs."""

    sgd: dict[str, Ends]
    gd: dict[str, Ends]
    decayed: dict[str, Ends]
    saturated: Ends


def run(config: Config) -> Outcome:
    """Simulate SGD, and gradient descent without label noise, with and without weight decay."""
    generator = torch.Generator().manual_seed(config.seed)
    sgd, gd, decayed = {}, {}, {}
    for world, condition in zip(WORLDS, (1.0, config.condition), strict=True):
        initial = start(config, condition, config.scale, generator)
        sgd[world] = _by_sgd(config, initial, config.lr, generator)
        gd[world] = _by_descent(config, initial, 0.0, generator)
        decayed[world] = _by_descent(config, initial, config.weight_decay, generator)
    saturating = start(config, 1.0, config.saturating_scale, generator)
    return Outcome(sgd, gd, decayed, _by_sgd(config, saturating, config.lr / 4, generator))


def claims(config: Config, outcome: Outcome) -> list[Claim]:
    """Compare the measurements with the predictions."""
    noise = {world: ends.noise_alignment for world, ends in outcome.sgd.items()}
    norms = outcome.sgd["anisotropic"].norm_alignment
    verdicts = [
        _mean("isotropic: SGD's noise alignment", noise["isotropic"], 1.0, low=0.95),
        _mean("anisotropic: SGD's noise alignment", noise["anisotropic"], 1.0, low=0.85),
        _mean(
            "anisotropic: SGD's noise alignment minus its norm alignment",
            noise["anisotropic"] - norms,
            1.0 - norms.mean().item(),
            low=0.15,
            wrong={"covariances dropped": 0.0},
        ),
    ]
    verdicts += [
        _mean(f"{world}: GD's noise alignment", outcome.gd[world].noise_alignment, 0.0, high=0.3) for world in WORLDS
    ]
    decayed = outcome.decayed["anisotropic"]
    return [
        *verdicts,
        _mean("anisotropic: GD + wd, norm alignment", decayed.norm_alignment, 1.0, low=0.99),
        _mean("anisotropic: GD + wd, noise alignment", decayed.noise_alignment, 0.7, high=0.85),
        _mean("tanh saturates: SGD's noise alignment falls", outcome.saturated.noise_alignment, 0.4, high=0.85),
    ]


def plot(config: Config, outcome: Outcome) -> Figure:
    """Draw the noise matrices of a replica for SGD and gradient descent, and the alignment of all replicas."""
    figure = style.panels(3, width=4.4)
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1), squeeze=False)[0]
    maps = left.subplots(2, 2)
    for row, (name, ends) in zip(maps, (("SGD", outcome.sgd), ("GD", outcome.gd)), strict=True):
        chosen = ends["anisotropic"]
        titles = (r"$W\Sigma_x W^T$", r"$U^T\Sigma_\epsilon U$")
        for axes, matrix, title in zip(row, (chosen.noise_in, chosen.noise_out), titles, strict=True):
            _heat(axes, matrix[0], f"{name}: {title}")
    axes = right.subplots()
    groups = {
        "SGD iso": outcome.sgd["isotropic"].noise_alignment,
        "SGD aniso": outcome.sgd["anisotropic"].noise_alignment,
        "SGD aniso,\nnorms": outcome.sgd["anisotropic"].norm_alignment,
        "GD iso": outcome.gd["isotropic"].noise_alignment,
        "GD aniso": outcome.gd["anisotropic"].noise_alignment,
        "GD + wd": outcome.decayed["anisotropic"].noise_alignment,
        "GD + wd,\nnorms": outcome.decayed["anisotropic"].norm_alignment,
    }
    for position, values in enumerate(groups.values()):
        axes.plot([position] * len(values), values, "o", **(style.MEASURED | {"markersize": 3, "alpha": 0.6}))
        axes.plot([position - 0.3, position + 0.3], [values.mean()] * 2, color="black")
    axes.set_xticks(range(len(groups)), list(groups), rotation=60, fontsize=7)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set(ylabel="cosine after subtraction of the trace", title="alignment, all replicas")
    return figure


def alignment(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of symmetric matrices (..., n, n) after subtraction of the trace part (Tr / n) 1, shape (...).

    Without the subtraction, the cosine of two unrelated positive matrices is large.

    Args:
        a: Shape (..., n, n).
        b: Shape (..., n, n).

    Returns:
        The cosine, shape (...).
    """
    identity = torch.eye(a.shape[-1], dtype=a.dtype)

    def traceless(matrix: Tensor) -> Tensor:
        trace = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
        return (matrix - trace[..., None, None] * identity).flatten(-2)

    return torch.nn.functional.cosine_similarity(traceless(a), traceless(b), dim=-1)


def _by_sgd(config: Config, start: Params, lr: float, generator: torch.Generator) -> Ends:
    """Train by SGD on fresh examples."""
    dynamics, data = SGD(lr, config.batch_size), linear_pair.standard_normal(config.inputs, config.outputs)
    trajectory = simulate(
        Student(config),
        linear_pair.loss,
        data,
        dynamics,
        steps=config.steps,
        start=start,
        generator=generator,
        record=config.steps,
    )
    return _ends(trajectory.params)


def _by_descent(config: Config, start: Params, weight_decay: float, generator: torch.Generator) -> Ends:
    """Train by gradient descent on a data set without label noise."""
    inputs = normal(config.descent_examples, config.inputs, generator=generator)
    no_noise = torch.zeros(config.descent_examples, config.outputs, dtype=torch.float64)

    # Weight decay for W and U alone: `weight_decay` of an optimizer would also change the teacher and the covariances.
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        values: Tensor = model(batch)
        w, u = model.w, model.u
        assert isinstance(w, Tensor)
        assert isinstance(u, Tensor)
        return values + weight_decay / 2 * (w.square().sum() + u.square().sum())

    trajectory = simulate(
        Student(config),
        loss,
        (inputs, no_noise),
        GradientDescent(config.descent_lr),
        steps=config.descent_steps,
        start=start,
        record=config.descent_steps,
    )
    return _ends(trajectory.params)


def _ends(params: Params) -> Ends:
    """Compute the matrices from the final parameters."""
    w, u = params["w"], params["u"]
    inputs, noise = w @ params["input_root"], params["noise_root"] @ u
    return Ends(inputs @ inputs.mT, noise.mT @ noise, w @ w.mT, u.mT @ u)


def _mean(
    text: str,
    values: Tensor,
    predicted: float,
    *,
    low: float | None = None,
    high: float | None = None,
    wrong: dict[str, float] | None = None,
) -> Claim:
    """Claim about the mean over the replicas."""
    return Claim(text, predicted, values.mean().item(), low, high, standard_error(values), wrong or {})


def _heat(axes: Axes, matrix: Tensor, title: str) -> None:
    """Draw a matrix as a heat map with symmetric colour limits."""
    reach = matrix.abs().max().item()
    axes.imshow(matrix.numpy(), cmap="PuOr", vmin=-reach, vmax=reach)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)
