"""The mean loss of given batches as a function of the parameters: values, gradients, and products with its Hessian."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from noetherflow._autograd import leaf, nodes_of
from noetherflow._batch import cast
from noetherflow._errors import NoetherflowError, SettingsError
from noetherflow._model_function import ModelFunction
from noetherflow._per_example import own_randomness, require_losses
from noetherflow._types import Batch, Loss, Params
from noetherflow.forecasting.differentiable import Differentiable, reason_of
from noetherflow.optimizers import Optimizer

# Vectors that are held at a time, in bytes.
_BYTES = 2**28
# The node that PyTorch puts behind a backward pass that cannot be differentiated.
_DELAYED = "torch::autograd::Error"


@final
class NoDoubleBackwardError(NoetherflowError):
    """An operation of the model has no second derivative; the message is a reason with what to do."""


@final
class Vectors(NamedTuple):
    """A product of the Hessian of a batch with a vector: the numbers of the batch and of the vector, and both."""

    batch: int
    number: int
    vector: dict[str, Tensor]
    product: dict[str, Tensor]


@final
class MeanLoss:
    r"""The mean loss $L(\theta)$ over all examples of given batches, without weight decay.

    H is the Hessian of L by the parameters that the optimizer trains and that a gradient reaches. The user's model is
    never changed.

    Args:
        model: The model, in the mode in which it trains.
        loss: `loss(model, batch)`, shape (B,).
        batches: The batches, which are kept.
        settings: The settings of the optimizer, which say what is trained.
        dtype: The floating-point type of the computation.

    Attributes:
        params: The parameters at the start, by name.
        sizes: The number of examples of every batch, float64, shape (batches,).
    """

    def __init__(
        self, model: nn.Module, loss: Loss, batches: Sequence[Batch], settings: Optimizer, dtype: torch.dtype
    ) -> None:
        self.model, self.loss, self.dtype = model, loss, dtype
        self.function = ModelFunction(model, loss, dtype)
        self.device = next(iter(self.function.params.values())).device
        self.batches = [cast(batch, dtype, self.device) for batch in batches]
        with own_randomness(self.device, seed=0):
            unreached = self.function.unreached(self.function.trained, self.batches[0])
        self.names = [n for n in self.function.trained if settings.trains(n) and n not in unreached]
        if any(self.function.params[name].is_complex() for name in self.names):
            raise SettingsError("a forecast needs real parameters, and the model has complex ones")
        self.params = {name: self.function.params[name] for name in self.names}
        sizes = [require_losses(self._losses(self.params, k), f"batch {k}") for k in range(len(self.batches))]
        self.sizes = torch.tensor(sizes, dtype=torch.float64)
        self.evaluations = 0

    @property
    def examples(self) -> int:
        """The number of examples."""
        return int(self.sizes.sum())

    @property
    def weights(self) -> Tensor:
        """The share of every batch in the mean, shape (batches,)."""
        return self.sizes / self.sizes.sum()

    def value(self, params: Params) -> float:
        """The mean loss: a forward pass over all batches."""
        self.evaluations += 1
        return sum(float(self._losses(params, k).double().sum()) for k in range(len(self.batches))) / self.examples

    def gradients(self, params: Params, numbers: Sequence[int] | None = None) -> list[tuple[float, dict[str, Tensor]]]:
        """Of every batch, or of the batches of given numbers, the mean loss and its gradient."""
        result = []
        for k in range(len(self.batches)) if numbers is None else numbers:
            with own_randomness(self.device, seed=0):
                losses, gradient = self.function.gradient(params, self.batches[k], self.names)
            size = float(self.sizes[k])
            result.append((float(losses.double().mean()), {name: g / size for name, g in gradient.items()}))
        return result

    def products(self, params: Params, count: int, seed: int) -> Iterator[Vectors]:
        """Products of the Hessian of every batch with random vectors of entries +1 and -1.

        Args:
            params: The parameters.
            count: The number of vectors, which are the same for all batches.
            seed: The seed of the vectors.

        Yields:
            The products, for one batch after the other.

        Raises:
            NoDoubleBackwardError: If an operation has no second derivative.
        """
        generator = torch.Generator().manual_seed(seed)
        room = max(1, _BYTES // (8 * sum(tensor.numel() for tensor in self.params.values())))
        for first in range(0, count, room):
            numbers = range(first, min(first + room, count))
            vectors = [self._signs(generator) for _ in numbers]
            for k in range(len(self.batches)):
                for number, vector, product in zip(numbers, vectors, self.multiply(params, k, vectors), strict=True):
                    yield Vectors(k, number, vector, product)

    def multiply(self, params: Params, number: int, vectors: Sequence[Params]) -> list[dict[str, Tensor]]:
        """Products of the Hessian of the mean loss of a batch with given vectors.

        Args:
            params: The parameters.
            number: The number of the batch.
            vectors: The vectors.

        Returns:
            The products, by parameter.

        Raises:
            NoDoubleBackwardError: If an operation has no second derivative.
            OutOfMemoryError: If the memory of the device does not suffice.
        """
        leaves = {name: leaf(params[name]) for name in self.names}
        result: list[dict[str, Tensor]] = []

        def differentiate(losses: Tensor) -> None:
            with torch.enable_grad():
                first = torch.autograd.grad(losses.mean(), list(leaves.values()), create_graph=True, allow_unused=True)
                _require_second_derivatives(first)
                curved = [(name, g) for name, g in zip(leaves, first, strict=True) if g is not None and g.requires_grad]
                for vector in vectors:
                    result.append(_product(leaves, curved, vector))

        # Of all kernels of attention, only that of plain matrix products has a second derivative.
        with own_randomness(self.device, seed=0), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), Differentiable():
            try:
                self.function.then({**params, **leaves}, self.batches[number], differentiate)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise NoDoubleBackwardError(reason_of(_first_line(error))) from error
        return result

    def hessian_times(self, params: Params, vector: Params) -> dict[str, Tensor]:
        """The product of H, the Hessian of the mean over all batches, with a vector."""
        total = {name: torch.zeros_like(tensor) for name, tensor in self.params.items()}
        for k, weight in enumerate(self.weights.tolist()):
            (product,) = self.multiply(params, k, [vector])
            for name, part in product.items():
                total[name] += weight * part
        return total

    def _losses(self, params: Params, number: int) -> Tensor:
        with own_randomness(self.device, seed=0):
            return self.function.losses(params, self.batches[number])

    def _signs(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A vector of random signs; drawn on the CPU, so that every device has the same signs."""
        return {
            name: (2.0 * torch.randint(0, 2, tensor.shape, generator=generator) - 1).to(tensor.device, tensor.dtype)
            for name, tensor in self.params.items()
        }


def _product(leaves: Mapping[str, Tensor], curved: Sequence[tuple[str, Tensor]], vector: Params) -> dict[str, Tensor]:
    """The gradient of the product of the gradient with a vector; zeros where nothing depends on the parameters."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in leaves.items()}
    if not curved:
        return zeros
    outputs = [g for _, g in curved]
    parts = torch.autograd.grad(
        outputs, list(leaves.values()), [vector[name] for name, _ in curved], retain_graph=True, allow_unused=True
    )
    return {name: zeros[name] if part is None else part.detach() for name, part in zip(leaves, parts, strict=True)}


def _require_second_derivatives(gradients: Sequence[Tensor | None]) -> None:
    """Raise if a gradient comes from a function with @once_differentiable.

    `torch.autograd.grad` does not report such a function: its error waits at a node from which no path leads to the
    parameters, and the Hessian silently lacks its part.

    Args:
        gradients: The gradients of the loss, with their graphs.

    Raises:
        NoDoubleBackwardError: See above.
    """
    for gradient in gradients:
        if gradient is not None and gradient.grad_fn is not None:
            for node in nodes_of(gradient.grad_fn):
                if node.name() == _DELAYED:
                    raise NoDoubleBackwardError(reason_of("a function is marked with @once_differentiable"))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
