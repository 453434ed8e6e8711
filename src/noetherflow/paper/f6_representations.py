r"""F6: representations align: the noise, not the norms, of two layers becomes the same.

In a tanh network $U \tanh(W x)$ in its near-linear regime, SGD makes $W \Sigma_x W^T$ proportional to
$U^T \Sigma_\epsilon U$. Gradient descent leaves them unrelated; with weight decay it aligns $W W^T$ with $U^T U$
instead. Isotropic data cannot tell the one from the other; anisotropic data can.

Source: Ziyin et al. (2024), figures 6 and 10.
"""

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from noetherflow._optimizers import SGD
from noetherflow._types import Params
from noetherflow.paper import linear_pair, style
from noetherflow.paper.claim import Claim
from noetherflow.paper.measure import geometric, standard_error
from noetherflow.simulation import GradientDescent, simulate

TITLE = "Representations align: the noise, not the norms, of two layers becomes the same"
WORLDS = ("isotropic", "anisotropic")


@final
@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the full-size run."""

    inputs: int = 6
    hidden: int = 8
    outputs: int = 6
    scale: float = 0.3
    saturating_scale: float = 2.0
    condition: float = 10.0
    lr: float = 0.02
    batch_size: int = 1
    steps: int = 40_000
    descent_lr: float = 0.1
    descent_steps: int = 4_000
    descent_examples: int = 2_048
    weight_decay: float = 0.02
    replicas: int = 16
    seed: int = 0

    @classmethod
    def quick(cls) -> "Config":
        """Reduced sizes, whose verdicts still mean something."""
        return cls(lr=0.03, steps=16_000, descent_examples=256, descent_steps=2_000)


@final
class Student(nn.Module):
    """A tanh network against a tanh teacher with label noise.

    Teacher and covariances (as their square roots) are dials: parameters that no gradient reaches, so that every
    replica of a simulation has its own.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()

        def filled(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.ones(shape, dtype=torch.float64))

        self.w, self.u = filled(config.hidden, config.inputs), filled(config.outputs, config.hidden)
        self.inner, self.outer = filled(config.hidden, config.inputs), filled(config.outputs, config.hidden)
        self.input_root = filled(config.inputs, config.inputs)
        self.noise_root = filled(config.outputs, config.outputs)

    def forward(self, standard: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of every example, shape (B,), from standard normal inputs and label noises."""
        x = standard[0] @ self.input_root.detach()
        y = torch.tanh(x @ self.inner.detach().mT) @ self.outer.detach().mT + standard[1] @ self.noise_root.detach()
        return (torch.tanh(x @ self.w.mT) @ self.u.mT - y).square().sum(-1)


@final
class Ends(NamedTuple):
    """What the layers look like at the end, shape (replicas, hidden, hidden): W Sx W', U' Se U, W W', U' U."""

    noise_in: Tensor
    noise_out: Tensor
    norm_in: Tensor
    norm_out: Tensor

    @property
    def noise_alignment(self) -> Tensor:
        """Cosine of the two noises after removing the traces, by replica."""
        return alignment(self.noise_in, self.noise_out)

    @property
    def norm_alignment(self) -> Tensor:
        """The same of the two Gram matrices."""
        return alignment(self.norm_in, self.norm_out)


@final
class Outcome(NamedTuple):
    """Ends of every way to train, by world."""

    sgd: dict[str, Ends]
    gd: dict[str, Ends]
    decayed: dict[str, Ends]
    saturated: Ends


def run(config: Config) -> Outcome:
    """SGD online, and gradient descent without label noise, with and without weight decay."""
    generator = torch.Generator().manual_seed(config.seed)
    sgd, gd, decayed = {}, {}, {}
    for world, condition in zip(WORLDS, (1.0, config.condition), strict=True):
        start = _start(config, condition, config.scale, generator)
        sgd[world] = _by_sgd(config, start, config.lr, generator)
        gd[world] = _by_descent(config, start, 0.0, generator)
        decayed[world] = _by_descent(config, start, config.weight_decay, generator)
    loud = _start(config, 1.0, config.saturating_scale, generator)
    return Outcome(sgd, gd, decayed, _by_sgd(config, loud, config.lr / 4, generator))


def claims(config: Config, outcome: Outcome) -> list[Claim]:
    """What must hold."""
    noise = {world: ends.noise_alignment for world, ends in outcome.sgd.items()}
    norms = outcome.sgd["anisotropic"].norm_alignment
    found = [
        _mean("isotropic: SGD's noise alignment", noise["isotropic"], 1.0, low=0.95),
        _mean("anisotropic: SGD's noise alignment", noise["anisotropic"], 1.0, low=0.85),
        _mean(
            "anisotropic: and above its norm alignment by",
            noise["anisotropic"] - norms,
            1.0 - norms.mean().item(),
            low=0.15,
            wrong={"covariances dropped": 0.0},
        ),
    ]
    found += [
        _mean(f"{world}: GD's noise alignment", outcome.gd[world].noise_alignment, 0.0, high=0.3) for world in WORLDS
    ]
    decayed = outcome.decayed["anisotropic"]
    return [
        *found,
        _mean("anisotropic: GD + wd, norm alignment", decayed.norm_alignment, 1.0, low=0.99),
        _mean("anisotropic: GD + wd, noise alignment", decayed.noise_alignment, 0.7, high=0.85),
        _mean("tanh saturates: SGD's noise alignment falls", outcome.saturated.noise_alignment, 0.4, high=0.85),
    ]


def plot(config: Config, outcome: Outcome) -> Figure:
    """The two matrices of one replica for SGD and for gradient descent, and the alignment of all."""
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
    axes.set(ylabel="cosine after removing the trace", title="alignment, all replicas")
    return figure


def alignment(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of symmetric matrices after removing the trace: that of two positive ones is large for nothing."""
    identity = torch.eye(a.shape[-1], dtype=a.dtype)

    def traceless(matrix: Tensor) -> Tensor:
        trace = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
        return (matrix - trace[..., None, None] * identity).flatten(-2)

    return torch.nn.functional.cosine_similarity(traceless(a), traceless(b), dim=-1)


def _by_sgd(config: Config, start: Params, lr: float, generator: torch.Generator) -> Ends:
    dynamics, data = SGD(lr, config.batch_size), linear_pair.standard_normal(config.inputs, config.outputs)
    found = simulate(
        Student(config),
        linear_pair.loss,
        data,
        dynamics,
        steps=config.steps,
        start=start,
        generator=generator,
        record=config.steps,
    )
    return _ends(found.params)


def _by_descent(config: Config, start: Params, weight_decay: float, generator: torch.Generator) -> Ends:
    inputs = _normal(config.descent_examples, config.inputs, generator=generator)
    silent = torch.zeros(config.descent_examples, config.outputs, dtype=torch.float64)

    # Decay is of the student's weights alone, not of the dials.
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        values: Tensor = model(batch)
        w, u = model.w, model.u
        assert isinstance(w, Tensor)
        assert isinstance(u, Tensor)
        return values + weight_decay / 2 * (w.square().sum() + u.square().sum())

    found = simulate(
        Student(config),
        loss,
        (inputs, silent),
        GradientDescent(config.descent_lr),
        steps=config.descent_steps,
        start=start,
        record=config.descent_steps,
    )
    return _ends(found.params)


def _ends(params: Params) -> Ends:
    w, u = params["w"], params["u"]
    inputs, noise = w @ params["input_root"], params["noise_root"] @ u
    return Ends(inputs @ inputs.mT, noise.mT @ noise, w @ w.mT, u.mT @ u)


def _start(config: Config, condition: float, scale: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Random students, teachers and covariances, one of each per replica."""

    def layer(rows: int, columns: int) -> Tensor:
        return _normal(config.replicas, rows, columns, generator=generator) / columns**0.5

    def root(size: int) -> Tensor:
        basis = torch.linalg.qr(_normal(config.replicas, size, size, generator=generator)).Q
        return (basis * geometric((condition**-0.25, condition**0.25), size)) @ basis.mT

    inner, outer = (config.hidden, config.inputs), (config.outputs, config.hidden)
    return {
        "w": layer(*inner),
        "u": layer(*outer),
        # An orthonormal layer passes everything on, so that the data decide what the layers look like.
        "inner": layer(*inner),
        "outer": torch.linalg.qr(layer(config.hidden, config.outputs)).Q.mT,
        "input_root": scale * root(config.inputs),
        "noise_root": root(config.outputs),
    }


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _mean(
    text: str,
    values: Tensor,
    predicted: float,
    *,
    low: float | None = None,
    high: float | None = None,
    wrong: dict[str, float] | None = None,
) -> Claim:
    return Claim(text, predicted, values.mean().item(), low, high, standard_error(values), wrong or {})


def _heat(axes: Axes, matrix: Tensor, title: str) -> None:
    reach = matrix.abs().max().item()
    axes.imshow(matrix.numpy(), cmap="PuOr", vmin=-reach, vmax=reach)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)
