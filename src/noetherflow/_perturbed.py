"""Parameters and buffers away from special points, such as zeros at the start of training and equal weights.

At a special point a transformation can leave the loss unchanged that changes it after a step of training: with B = 0 in
W + B A, any scaling of A. A symmetry of the architecture holds at all parameters and buffers, so a proof needs a
generic point.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from noetherflow._model_function import ModelFunction
from noetherflow._per_example import own_randomness
from noetherflow._types import Batch

# The standard deviation of the logarithm of an entry's factor. In a deep network without normalisation 0.3 makes the
# variance of activations grow by about 1.3 in each layer. Smaller sizes are for losses that are not finite there.
SIZES = (0.3, 0.1, 0.02)
GIVEN_ONLY = "the losses are not finite at other parameters: symmetries are proved at the given parameters only"
# Points at most, and the size of the perturbation of further points where units were dead.
_POINTS, _FAR = 5, 1.0
# Entries of masks, such as -1e9 in front of a softmax: more than this is infinity, and stays.
_INFINITE = 1e4


@final
class Perturbation:
    r"""Random numbers that move tensors to a generic point near their value, the same numbers for one seed.

    An entry $t$ becomes $t e^{s n} + s r n'$ with standard normal numbers n and n' and the root mean square r of the
    tensor. Integers, booleans, infinite entries, and entries beyond 1e4 of a buffer keep their value. A tensor whose
    entries have one sign (a variance, a scale) keeps the sign, except parameters at $s = 1$. A tensor of zeros gets
    numbers of standard deviation $s/\sqrt{m}$, where m is the number of entries of an output (a row), as at an
    initialisation.

    Args:
        size: s.
        seed: The seed of the numbers; the global generator is not used.

    Examples:
        >>> import torch
        >>> perturbation = Perturbation(0.3)
        >>> zeros, variance = torch.zeros(3), torch.ones(3)
        >>> bool((perturbation(zeros) != 0).all()), bool((perturbation(variance) > 0).all())
        (True, True)
    """

    def __init__(self, size: float, seed: int = 0) -> None:
        self._size = size
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, tensor: Tensor) -> Tensor:
        """The perturbed copy of a parameter; a tensor that is no floating-point or complex number as it is."""
        return self._moved(tensor, torch.isfinite, keep_sign=self._size < _FAR)

    def buffer(self, tensor: Tensor) -> Tensor:
        """The perturbed copy of a buffer, which may be a mask with very large entries."""
        return self._moved(tensor, lambda numbers: numbers.abs() <= _INFINITE, keep_sign=True)

    def _moved(self, tensor: Tensor, is_ordinary: Callable[[Tensor], Tensor], *, keep_sign: bool) -> Tensor:
        if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        if tensor.is_complex():
            # Both parts move on their own, so that no direction in the complex plane is special.
            parts = torch.view_as_real(tensor.resolve_conj())
            return torch.view_as_complex(self._moved(parts, is_ordinary, keep_sign=keep_sign).contiguous())
        ordinary = is_ordinary(tensor)
        count = int(ordinary.sum())
        if count == 0:
            return tensor
        numbers = tensor if count == tensor.numel() else torch.where(ordinary, tensor, 0.0)
        rms = float(torch.linalg.vector_norm(numbers)) / math.sqrt(count)
        moved = numbers * self._normal(tensor).mul_(self._size).exp_()
        if rms == 0.0:
            moved = self._normal(tensor).mul_(self._size / math.sqrt(tensor[0].numel() if tensor.ndim > 1 else 1))
        elif keep_sign and bool((numbers >= 0).all() | (numbers <= 0).all()):
            # Zeros among numbers of one sign, such as a mask or a count, become numbers of that sign.
            sign = 1.0 if bool((numbers > 0).any()) else -1.0
            zeros = self._normal(tensor).abs_().mul_(sign * self._size * rms)
            moved = torch.where(numbers == 0, zeros, moved)
        else:
            moved += self._normal(tensor).mul_(self._size * rms)
        return moved if count == tensor.numel() else torch.where(ordinary, moved, tensor)

    def _normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers. They are drawn on the CPU, so that all devices get the same numbers."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        return torch.randn(like.shape, generator=self._generator, dtype=dtype).to(like)


class Point(NamedTuple):
    """A model function at a generic point, the size of the perturbation, and a sentence about what did not move."""

    function: ModelFunction
    size: float
    note: str = ""


def generic_points(function: ModelFunction, batch: Batch) -> Iterator[Point]:
    """A model function at perturbed parameters and buffers: a point, and further points if the caller needs them.

    At a point at which the units of a layer are dead, no gradient reaches the layer, and nothing is tested. Further
    points are further away where rounding allows, because dead units stay dead nearby; biases may change their sign.
    For each point the largest size is taken at which losses and gradients are finite. If there is none, the buffers
    keep their values: a model may compute with its buffers what no other numbers allow.

    Args:
        function: The function, which is not changed.
        batch: The examples whose losses and gradients have to be finite.

    Yields:
        Five points at most; no point if the losses are finite at the given parameters only.
    """
    is_exact = function.precision == torch.float64
    for seed in range(_POINTS):
        sizes = (_FAR, *SIZES) if seed and is_exact else SIZES
        point = _finite_point(function, batch, sizes, seed)
        if point is None:
            return
        yield point


def _finite_point(function: ModelFunction, batch: Batch, sizes: Sequence[float], seed: int) -> Point | None:
    """The point of the largest size at which losses and gradients are finite; buffers move if possible."""
    for note in ("", "the losses are not finite at other buffers: symmetries are proved at the given buffers only"):
        for size in sizes:
            perturbation = Perturbation(size, seed)
            change_buffer = _unchanged if note else perturbation.buffer
            moved = function.moved(perturbation, change_buffer)
            gradient = _finite_gradient(moved, batch)
            candidate = _with_padding_of(function, moved, gradient or {})
            if gradient is not None and (candidate is moved or _finite_gradient(candidate, batch) is not None):
                return Point(candidate, size, note)
    return None


def _with_padding_of(given: ModelFunction, moved: ModelFunction, gradient: Mapping[str, Tensor]) -> ModelFunction:
    """The moved function, with padding rows as they are given.

    A lookup reads the padding row of an embedding and gives the row no gradient, so training keeps the row at its
    initial value, zero. At another value the gradient of a loss lacks a part, and no symmetry could be proved. A weight
    that is used in a further place, such as an output layer, has a gradient in this row: such a row moves.

    Args:
        given: The function at the given parameters.
        moved: The function at perturbed parameters.
        gradient: The gradient of the sum of the losses at the perturbed parameters, by name.

    Returns:
        A function with other values of these rows; `moved` itself if there are no such rows.
    """
    kept = {}
    for name, rows in given.padding.items():
        index = [row for row in rows if name in gradient and not gradient[name][row].any()]
        if index:
            kept[name] = moved.params[name].clone()
            kept[name][index] = given.params[name][index]
    return moved.with_values(kept) if kept else moved


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _finite_gradient(function: ModelFunction, batch: Batch) -> dict[str, Tensor] | None:
    """The gradient of the sum of all losses by name; None unless all losses and the gradient are finite."""
    device = next(iter(function.params.values())).device
    try:
        with own_randomness(device, seed=0), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            numbers = {name: t for name, t in function.params.items() if t.is_floating_point() or t.is_complex()}
            losses, gradient = function.gradient(function.trained or numbers, batch)
    except Exception:
        # At numbers for which it was not made, a model may raise errors of any kind, such as those of a factorisation.
        return None
    finite = bool(torch.isfinite(losses).all()) and all(bool(torch.isfinite(g).all()) for g in gradient.values())
    return gradient if finite else None
