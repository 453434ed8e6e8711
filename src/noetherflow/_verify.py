"""Is it a symmetry? A numerical certificate."""

from collections import Counter
from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor, nn

from noetherflow import _spd
from noetherflow._batch import cast, select
from noetherflow._params import aliases, bind, require_finite, snapshot
from noetherflow._per_example import Losses, own_randomness, require_losses
from noetherflow._types import Batch, Loss, Params
from noetherflow.symmetry import Symmetry

# Typical size of the coordinates of the finite transformations that are tried: tensors change by factors of about
# e^{+-1/2}.
_SIZE = 0.5


@final
class Residual(float):
    """How far a transformation is from being a symmetry: the larger of its two parts, as a number.

    Attributes:
        loss: Largest change of the loss of a single example under a finite transformation, relative to the size of
            that loss or of the batch's mean, whichever is larger.
        gradient: Largest cosine between the gradient of a single example and the direction of motion Q theta.
        example: Index in the batch of the example that is worst.

    Examples:
        >>> import noetherflow as nf
        >>> residual = nf.Residual(loss=1e-14, gradient=2e-15, example=3)
        >>> residual < 1e-12, residual.example
        (True, 3)
    """

    loss: float
    gradient: float
    example: int

    def __new__(cls, loss: float, gradient: float, example: int) -> "Residual":
        """Combine both parts."""
        self = super().__new__(cls, max(loss, gradient))
        self.loss, self.gradient, self.example = loss, gradient, example
        return self

    def __getnewargs__(self) -> tuple[float, float, int]:  # type: ignore[override]
        """The parts, from which pickle and copy make the residual again; a float gives only its value."""
        return self.loss, self.gradient, self.example


def verify_symmetry(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    symmetry: Symmetry,
    *,
    draws: int = 3,
    dtype: torch.dtype = torch.float64,
    generator: torch.Generator | None = None,
) -> Residual:
    r"""Measure how much a declared symmetry changes the loss of any single example.

    A symmetry leaves $\ell(e^{Q_x}\theta, z) = \ell(\theta, z)$ for every example z, and so
    $\nabla\ell \cdot Q_x\theta = 0$. Both are tried on random coordinates x, on a copy of the model in float64: an
    exact symmetry leaves only rounding, about 1e-14.

    Args:
        model: The model, in the mode (train or eval) in which the question is asked. It is not changed.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        batch: Some examples.
        symmetry: The declaration to test.
        draws: How many finite transformations to try.
        dtype: Floating-point type of the check.
        generator: Source of the random coordinates; a fixed one by default.

    Returns:
        The residual, a float that also knows its two parts and the worst example; dimensionless.

    Raises:
        ParameterNameError: If the symmetry names parameters that the model does not have.
        ParameterShapeError: If its axes do not fit.
        NonFiniteError: If a parameter or a loss is not finite to begin with.
        LossError: If the loss does not return one number per example.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> batch = torch.randn(8, 4), torch.randn(8, 1)
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> into, out_of = [nf.Axis("0.weight", 0), nf.Axis("0.bias", 0)], [nf.Axis("2.weight", 1)]
        >>> hidden = nf.DiagonalSymmetry(into, out_of)
        >>> forgot_the_bias = nf.DiagonalSymmetry([nf.Axis("0.weight", 0)], [nf.Axis("2.weight", 1)])
        >>> nf.verify_symmetry(net, loss, batch, hidden) < 1e-12
        True
        >>> nf.verify_symmetry(net, loss, batch, forgot_the_bias) > 1e-3
        True

    Source: Ziyin et al. (2024), the definition of an exponential symmetry.
    """
    symmetry = symmetry.rename(aliases(model))
    params = snapshot(model, dtype)
    require_finite(params, "parameter")
    symmetry.check(params)
    device = next(iter(params.values())).device
    batch = cast(batch, dtype, device)
    losses = bind(model, loss, dtype)
    generator = generator or torch.Generator().manual_seed(0)
    # The same seed before every evaluation, so that dropout drops the same units before and after.
    with own_randomness(device, seed=0), torch.no_grad():
        before = losses(params, batch)
    size = require_losses(before, "verify_symmetry")
    change = torch.zeros_like(before)
    for x in random_coordinates(symmetry, params, draws, generator):
        with own_randomness(device, seed=0), torch.no_grad():
            after = losses(symmetry.act(x, params), batch)
        change = torch.maximum(change, relative_change(before, after))
    cosine = _worst_cosines(symmetry, losses, params, batch, size, generator)
    worst = torch.maximum(change, cosine)
    return Residual(change.max().item(), cosine.max().item(), int(worst.argmax()))


def random_coordinates(symmetry: Symmetry, params: Params, draws: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Some elements of a symmetry's algebra, of a size at which tensors change by factors of about e^(+-1/2)."""
    identity = symmetry.identity(params)
    # Behind powers of activations a tensor may be multiplied by e^(64 x), and numbers end at e^709.
    power = max(Counter(symmetry.regions(params)).values())
    for _ in range(draws):
        x = _SIZE / power * torch.randn(identity.shape, generator=generator, dtype=torch.float64)
        if x.ndim == 2:
            x = _spd.symmetric(x) / len(x) ** 0.5
        yield x.to(identity)


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """How much each loss has changed, relative to itself or to the mean of all, whichever is larger."""
    scale = torch.maximum(before.abs(), before.abs().mean()).clamp_min(torch.finfo(before.dtype).tiny)
    return ((after - before).abs() / scale).nan_to_num(nan=torch.inf)


def cosine(gradients: Params, direction: Params) -> Tensor:
    """|g . v| / (|g| |v|) over the parameters that v moves; 0 where one of them vanishes."""
    pairs = [_of_unit_size([side[name] for name in direction]) for side in (gradients, direction)]
    along = torch.stack([(g * v).sum() for g, v in zip(*pairs, strict=True)]).sum()
    sizes = [torch.stack([one.square().sum() for one in side]).sum().sqrt() for side in pairs]
    return (along.abs() / (sizes[0] * sizes[1])).nan_to_num(nan=0.0)


def _of_unit_size(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors over their largest entry, so that squares neither vanish nor overflow."""
    largest = torch.stack([one.abs().max() for one in tensors if one.numel()]).max()
    return [one / largest for one in tensors]


def _worst_cosines(
    symmetry: Symmetry, losses: Losses, params: dict[str, Tensor], batch: Batch, size: int, generator: torch.Generator
) -> Tensor:
    """|g . Q theta| / (|g| |Q theta|) of every example, over the parameters on which the symmetry acts; shape (B,)."""
    (x,) = random_coordinates(symmetry, params, 1, generator)
    direction = symmetry.generate(x, {name: params[name] for name in symmetry.names})
    device = next(iter(params.values())).device
    cosines = []
    # One example at a time: this is a certificate for models of any size, and must not need B copies of their
    # gradients.
    for index in range(size):
        one = select(batch, torch.tensor([index], device=device), size)
        leaves = {name: tensor.detach().requires_grad_(name in symmetry.names) for name, tensor in params.items()}
        with own_randomness(device, seed=0), torch.enable_grad():
            value = losses(leaves, one).sum()
        touched = [leaves[name] for name in symmetry.names]
        gradients = torch.autograd.grad(value, touched, allow_unused=True, materialize_grads=True)
        cosines.append(cosine(dict(zip(symmetry.names, gradients, strict=True)), direction))
    return torch.stack(cosines)
