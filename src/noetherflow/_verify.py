"""The numerical certificate of a declared symmetry."""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from noetherflow import _spd
from noetherflow._batch import cast
from noetherflow._dtype import announced_dtype
from noetherflow._examples import Examples
from noetherflow._given import require_loss, require_model
from noetherflow._model_function import ModelFunction
from noetherflow._params import aliases
from noetherflow._per_example import own_randomness, require_losses
from noetherflow._perturbed import GIVEN_ONLY, generic_points
from noetherflow._residual import active_rows, cosine, is_rounding, relative_change
from noetherflow._types import Batch, Loss, Params
from noetherflow.symmetry import Symmetry

# Typical size of the coordinates of finite transformations, which change tensors by factors of about e^{+-1/2}.
_SIZE = 0.5


@final
class Residual(float):
    """The deviation of a transformation from a symmetry: max(loss, gradient), a dimensionless number.

    Attributes:
        loss: Largest change of the loss of an example under a finite transformation, relative to the absolute value of
            that loss or to the mean of all absolute losses, whichever is larger.
        gradient: Largest cosine between the gradient of an example and the direction of motion Q theta.
        example: Index in the batch of the example with the largest deviation.
        precision: The coarsest floating-point type in which the losses were computed. The residual of an exact symmetry
            is rounding in this type.
        point: Where the deviation is largest: `given` for the parameters of the model, `perturbed` for a generic point.
        perturbation: The size of the perturbation that leads to the generic point, the standard deviation of the
            logarithm of an entry's factor. 0 if the symmetry was tested at the given parameters only, because the
            losses are not finite elsewhere: the symmetry may then hold at special parameters only.
        untested: The number of rows of the symmetry that no gradient reaches at any perturbed point, such as units that
            are dead for all examples: nothing is known about these rows.

    Examples:
        >>> import noetherflow as nf
        >>> residual = nf.Residual(loss=1e-14, gradient=2e-15, example=3)
        >>> residual < 1e-12, residual.example
        (True, 3)
    """

    loss: float
    gradient: float
    example: int
    precision: torch.dtype
    point: str
    perturbation: float
    untested: int

    def __new__(
        cls,
        loss: float,
        gradient: float,
        example: int,
        precision: torch.dtype = torch.float64,
        point: str = "given",
        perturbation: float = 0.0,
        untested: int = 0,
    ) -> "Residual":
        """A float whose value is the larger part."""
        self = super().__new__(cls, max(loss, gradient))
        self.loss, self.gradient, self.example, self.precision = loss, gradient, example, precision
        self.point, self.perturbation, self.untested = point, perturbation, untested
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        """The arguments with which pickle and copy make the residual again; the default for a float is its value."""
        return tuple(getattr(self, name) for name in self.__annotations__)


def verify_symmetry(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    symmetry: Symmetry,
    *,
    draws: int = 3,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Residual:
    r"""Measure how much a declared symmetry changes the losses of single examples.

    A symmetry satisfies $\ell(e^{Q_x}\theta, z) = \ell(\theta, z)$ for every example z, and therefore
    $\nabla\ell \cdot Q_x\theta = 0$. Both equations are tested at random coordinates x, on a copy of the model in
    float64, at the parameters of the model and at perturbed parameters and buffers. At a special point, such as weights
    or running means that are zero at the start of training, transformations leave the loss unchanged that are no
    symmetries. The perturbation multiplies every entry by a random factor, adds random numbers of the size of the
    tensor, and replaces zeros; integers, booleans and infinite entries of masks keep their value, and positive tensors
    stay positive. Rows without a gradient at the perturbed point, such as dead units, are tested at further points,
    five at most. The residual is the largest of all points.

    The residual of an exact symmetry is rounding, about 1e-14. If a layer always computes in a coarser type, such as a
    normalisation in float32, the residual is rounding in that type: see `Residual.precision`. Complex parameters are
    multiplied by real factors.

    Args:
        model: The model, in the mode (train or eval) in which the symmetry is declared. It is not changed.
        loss: `loss(model, batch)` with one loss per example, shape (B,).
        batch: The examples on which the symmetry is tested.
        symmetry: The declared symmetry.
        draws: Number of finite transformations at each point.
        dtype: Floating-point type of the copy of the model; by default float64, or the model's type if the model is
            very large or cannot be computed in float64.
        generator: Source of the random coordinates; by default a generator with seed 0.

    Returns:
        The residual, a float with both parts and the index of the worst example as attributes; dimensionless.

    Raises:
        ParameterNameError: If the symmetry names parameters that the model does not have.
        ParameterShapeError: If the axes of the symmetry do not fit the parameters.
        NonFiniteError: If a parameter or a loss is not finite at the parameters of the model.
        LossError: If the loss raises an error, or does not return one number per example.
        HiddenParameterError: If the loss reaches a parameter without the attribute of its module.
        SettingsError: If the model is not a module, such as a symmetry in its place, if it has no parameters or no
            numbers (on the meta device), if the batch is a loader, or if no proof is possible in the dtype.

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
    names = aliases(model)
    symmetry = symmetry.rename(names)
    device = require_model(model)
    symmetry.check(dict(model.named_parameters()))
    require_loss(model, loss, batch, "verify_symmetry")
    dtype = announced_dtype(model, loss, batch, dtype)
    function = ModelFunction(model, loss, dtype)
    batch = cast(batch, dtype, device)
    generator = generator or torch.Generator().manual_seed(0)
    with own_randomness(device, seed=0):
        size = require_losses(function.losses(function.params, batch), "verify_symmetry")
    examples = Examples(model, function, batch, size)
    with own_randomness(device, seed=0):
        function.observe(examples.batches[0])
    tests = _Tests(symmetry, batch, examples, draws, generator)
    residuals = [tests.at(function)[0]]
    tested = torch.zeros((), dtype=torch.bool)
    note = GIVEN_ONLY
    for point in generic_points(function, batch):
        note = point.note
        residual, rows = tests.at(point.function, point.size)
        tested = tested | rows
        residuals.append(residual)
        if tested.all():
            break
    result = worst_of(residuals, int((~tested).sum()))
    if note and result <= function.tolerance.proof:
        warnings.warn(note, stacklevel=2)
    return result


def worst_of(residuals: Sequence[Residual], untested: int) -> Residual:
    """The largest residual of a symmetry over all points.

    Args:
        residuals: The residual at the given parameters, and those at perturbed points.
        untested: The number of rows without a gradient at all perturbed points.

    Returns:
        The largest residual, with the largest perturbation.
    """
    worst = max(residuals, key=float)
    size = max(residual.perturbation for residual in residuals)
    untested = untested if size else 0
    return Residual(worst.loss, worst.gradient, worst.example, worst.precision, worst.point, size, untested)


def random_coordinates(symmetry: Symmetry, params: Params, draws: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Random elements x of the Lie algebra, `draws` of them; e^{Q_x} changes tensors by factors of about e^{+-1/2}."""
    identity = symmetry.identity(params)
    identity = identity.real if identity.is_complex() else identity
    # After powers of activations, a tensor may be multiplied by e^(64 x); float64 overflows at e^709.
    power = max(Counter(symmetry.regions(params)).values())
    for _ in range(draws):
        x = _SIZE / power * torch.randn(identity.shape, generator=generator, dtype=torch.float64)
        if x.ndim == 2:
            x = _spd.symmetric(x) / len(x) ** 0.5
        yield x.to(identity)


@final
class _Tests:
    """The tests of a declared symmetry at any parameters.

    Args:
        symmetry: The symmetry, with canonical names.
        batch: The batch, in the type of the model function.
        examples: The examples whose gradients are compared with directions.
        draws: The number of finite transformations.
        generator: Source of the random coordinates.
    """

    def __init__(
        self, symmetry: Symmetry, batch: Batch, examples: Examples, draws: int, generator: torch.Generator
    ) -> None:
        self._symmetry = symmetry
        self._batch = batch
        self._examples = examples
        self._draws = draws
        self._generator = generator

    def at(self, function: ModelFunction, perturbation: float = 0.0) -> tuple[Residual, Tensor]:
        """The residual at the parameters of a function, and the rows that are tested, shape (n,) or (1,)."""
        change = self._changes(function)
        cosines, rows = self._cosines(function)
        worst = torch.maximum(change, cosines)
        point = "perturbed" if perturbation else "given"
        numbers = change.max().item(), cosines.max().item(), int(worst.argmax())
        return Residual(*numbers, function.precision, point, perturbation), rows

    def _changes(self, function: ModelFunction) -> Tensor:
        """The largest relative change of the loss of every example under finite transformations, shape (B,)."""
        params = function.params
        device = next(iter(params.values())).device
        # One seed for all evaluations, so that dropout drops equal units before and after the transformation.
        with own_randomness(device, seed=0):
            before = function.losses(params, self._batch)
        change = torch.zeros_like(before)
        for x in random_coordinates(self._symmetry, params, self._draws, self._generator):
            with own_randomness(device, seed=0):
                after = function.losses(self._symmetry.act(x, params), self._batch)
            change = torch.maximum(change, relative_change(before, after))
        return change.cpu()

    def _cosines(self, function: ModelFunction) -> tuple[Tensor, Tensor]:
        """|g . Q theta| / (|g| |Q theta|) for the gradient g of every example, shape (B,), and the rows tested."""
        params = {name: function.params[name] for name in self._symmetry.names}
        (x,) = random_coordinates(self._symmetry, params, 1, self._generator)
        direction = self._symmetry.generate(x, params)

        def compared(losses: Tensor, gradients: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            slope, rows = cosine(gradients, direction).cpu(), active_rows(self._symmetry, gradients, params).cpu()
            if is_rounding(losses, gradients, direction, function.precision):
                slope, rows = torch.zeros_like(slope), torch.zeros_like(rows)
            return slope, rows

        cosines, tested = zip(*self._examples.each(function, params, compared), strict=True)
        return torch.stack(cosines), torch.stack(tested).any(0)
