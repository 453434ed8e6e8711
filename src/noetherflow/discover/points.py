"""Parameters, buffers and examples that are drawn at random, and the gradients of single examples there."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from noetherflow._batch import is_per_example, map_tensors, tensors_of, with_tensors
from noetherflow._device import require_float64
from noetherflow._dtype import working_dtype
from noetherflow._errors import FrozenParameterError, LossError, NoetherflowError, SettingsError
from noetherflow._model_function import ModelFunction
from noetherflow._params import aliases, in_dtype
from noetherflow._per_example import own_randomness, require_losses
from noetherflow._residual import relative_change
from noetherflow._types import Batch, Loss

# Points per evaluation, and numbers in their gradients.
_MOST_POINTS = 512
_MOST_NUMBERS = 20_000_000
# Points with which a kind of draw is tried; half of the gradients have to be finite.
_TRIAL = 32

Tensors = dict[str, Tensor]


class Sample(NamedTuple):
    """Points whose gradients are finite.

    Args:
        params: The parameters, shape (m, *parameter) by name.
        gradients: The gradient of an example's loss at each point, shape (m, *parameter) by name.
        examples: The index of that example in the batch, shape (m,).
        drawn: How many points were drawn, those with a gradient that is not finite included.
    """

    params: Tensors
    gradients: Tensors
    examples: Tensor
    drawn: int


class _Kind(NamedTuple):
    """What is drawn at random, beside the parameters; `near` draws parameters of the sign of the model's."""

    buffers: bool
    inputs: bool
    near: bool
    note: str


_KINDS = (
    _Kind(True, True, False, ""),
    _Kind(False, True, False, "buffers were not drawn anew: there are no finite losses at random buffers"),
    _Kind(False, False, False, "inputs and buffers were not drawn anew: there are no finite losses at random inputs"),
    _Kind(
        False,
        False,
        True,
        "parameters keep their signs in the model: there are no finite losses elsewhere",
    ),
)


@final
class Points:
    """A source of random parameters, buffers and examples, and of gradients there.

    Parameters and the floating-point tensors of examples are standard normal numbers. Integers of examples are those of
    the batch, whose examples are used in turn. Buffers that are part of the state dict are drawn anew for every sample:
    positive buffers are multiplied by random factors, so that variances stay positive; masks (of 0 and 1, or with
    infinite entries) stay as they are. If such losses are not finite, fewer tensors are drawn.

    Args:
        model: The model. It is not changed.
        loss: `loss(model, batch)`, shape (B,).
        batch: The examples.
        generator: Source of random numbers; by default a generator with seed 0.

    Attributes:
        names: The trainable parameters.
        shapes: Their shapes.
        size: Number of their entries.
        count: Number of examples B of the batch.
        scale: Mean absolute value of the losses of the batch.
        precision: The coarsest floating-point type in which the loss is computed.
        note: What was not drawn, and why; empty if everything was.

    Raises:
        FrozenParameterError: If the model has no trainable parameter.
        SettingsError: If a trainable parameter is complex, or if the model is not a module.
        LossError: If the loss cannot be evaluated.
    """

    def __init__(self, model: nn.Module, loss: Loss, batch: Batch, generator: torch.Generator | None) -> None:
        _require_real(model)
        require_float64(tensor.device for tensor in model.parameters())
        self._generator = generator or torch.Generator().manual_seed(0)
        with _explained():
            working = working_dtype(model, loss, batch)
            dtype = torch.float64 if working.by_size else working.dtype
            function = ModelFunction(model, loss, dtype)
            self._params = function.trained
            self._device = next(iter(self._params.values())).device
            self._dtype = dtype
            self._batch = map_tensors(lambda tensor: in_dtype(tensor.to(self._device), dtype), batch)
            with own_randomness(self._device, seed=0):
                losses = function.losses(self._params, self._batch)
                self.count = require_losses(losses, "the discovery of symmetries")
                self.precision = function.observe(self._batch).precision
        self._function = function
        self.scale = float(losses.abs().mean())
        self.names = tuple(self._params)
        self.shapes = {name: tensor.shape for name, tensor in self._params.items()}
        self.size = sum(tensor.numel() for tensor in self._params.values())
        self._order: Iterator[int] = self._endless_order()
        self._kind = self._choose_kind()
        self.note = self._kind.note

    @property
    def at_once(self) -> int:
        """The largest number of points of a sample."""
        return max(1, min(_MOST_POINTS, _MOST_NUMBERS // self.size))

    @property
    def needs_every_example(self) -> bool:
        """Whether examples differ by integers, which are not drawn anew."""
        leaves = (leaf for leaf in tensors_of(self._batch) if is_per_example(leaf, self.count))
        return not self._kind.inputs or any(not _is_continuous(leaf) for leaf in leaves)

    def sample(self, count: int, scale: float = 1.0, examples: Tensor | None = None) -> Sample:
        """Draw points and evaluate the gradients there.

        Args:
            count: Number of points.
            scale: Standard deviation of the parameters.
            examples: Indices of examples that are used first, shape (j,) with j at most `count`.

        Returns:
            The points with finite gradients.
        """
        first = torch.zeros(0, dtype=torch.long) if examples is None else examples
        rest = torch.tensor([next(self._order) for _ in range(count - len(first))], dtype=torch.long)
        chosen = torch.cat([first, rest])
        params = {name: self._draw_parameter(name, count, scale) for name in self.names}
        leaves = [self._draw_leaf(leaf, chosen) for leaf in tensors_of(self._batch)]
        with _explained(), own_randomness(self._device, seed=self._seed()):
            _, gradients = self._draw_function().at_points(params, leaves, self._rebuild)
        # Rows of equations are made and solved on the CPU, also if parameters are on several devices.
        params, gradients = ({name: t.cpu() for name, t in tensors.items()} for tensors in (params, gradients))
        finite = torch.ones(count, dtype=torch.bool)
        for gradient in gradients.values():
            finite &= gradient.isfinite().reshape(len(gradient), math.prod(gradient.shape[1:])).all(1)
        params, gradients = ({name: t[finite] for name, t in tensors.items()} for tensors in (params, gradients))
        return Sample(params, gradients, chosen[finite], count)

    def changes(self, count: int, scale: float, move: Callable[[Tensors], Tensors]) -> Tensor:
        """Relative changes of losses under a transformation of the parameters.

        Args:
            count: Number of points.
            scale: Standard deviation of the parameters.
            move: The transformation of stacked parameters, shape (m, *parameter) by name.

        Returns:
            The changes, of the points where both losses are finite, shape (m,).
        """
        chosen = torch.tensor([next(self._order) for _ in range(count)], dtype=torch.long)
        params = {name: self._draw_parameter(name, count, scale) for name in self.names}
        leaves = [self._draw_leaf(leaf, chosen) for leaf in tensors_of(self._batch)]
        function, seed = self._draw_function(), self._seed()
        with _explained():
            losses = []
            for given in (params, params | move(params)):
                with own_randomness(self._device, seed=seed):
                    losses.append(function.at_points(given, leaves, self._rebuild)[0])
        before, after = losses
        finite = before.isfinite() & after.isfinite()
        return relative_change(before[finite], after[finite]).cpu() if finite.any() else torch.zeros(0)

    def _choose_kind(self) -> _Kind:
        """The first kind of draw at which half of the gradients are finite; the last kind if there is none."""
        for kind in _KINDS:
            self._kind = kind
            try:
                if len(self.sample(_TRIAL).examples) >= _TRIAL // 2:
                    break
            except LossError:
                # A loss may refuse random inputs, such as targets of a cross-entropy outside [0, 1].
                if kind is _KINDS[-1]:
                    raise
        return kind

    def pretend(self, count: int) -> tuple[Tensors, Tensors]:
        """Parameters, and random tensors in place of gradients: equations that hold for these hold for any loss."""
        params, gradients = (
            {name: self._normal(count, *shape).cpu() for name, shape in self.shapes.items()} for _ in range(2)
        )
        return params, gradients

    def _rebuild(self, tensors: list[Tensor]) -> Batch:
        return with_tensors(self._batch, tensors)

    def _draw_function(self) -> ModelFunction:
        """The losses at buffers that are drawn anew."""
        return self._function.with_state(self._draw_buffer) if self._kind.buffers else self._function

    def _draw_parameter(self, name: str, count: int, scale: float) -> Tensor:
        numbers = self._normal(count, *self.shapes[name]).to(self._params[name].device)
        if not self._kind.near:
            return scale * numbers
        numbers *= min(scale, 3.0)  # the logarithm of a factor
        given = self._params[name]
        # An entry at zero has no sign; it becomes positive.
        return torch.where(given == 0, 0.3 * numbers.abs(), given * (0.3 * numbers).exp())

    def _draw_leaf(self, leaf: Tensor, chosen: Tensor) -> Tensor:
        if not is_per_example(leaf, self.count):
            return leaf.expand(len(chosen), *leaf.shape)
        if self._kind.inputs and leaf.is_complex():
            shape = (len(chosen), 1, *leaf.shape[1:])
            return torch.complex(self._normal(*shape), self._normal(*shape))
        if self._kind.inputs and leaf.is_floating_point():
            return self._normal(len(chosen), 1, *leaf.shape[1:])
        return leaf[chosen.to(leaf.device)].unsqueeze(1)

    def _draw_buffer(self, buffer: Tensor) -> Tensor:
        if not buffer.isfinite().all() or _is_mask(buffer):
            return buffer
        numbers = self._normal(*buffer.shape).to(buffer.device)
        return buffer * (0.5 * numbers).exp() if (buffer > 0).all() else numbers.to(buffer.dtype)

    def _seed(self) -> int:
        """A seed for the random numbers of the model, such as those of dropout."""
        return int(torch.randint(2**31, (), generator=self._generator, device=self._generator.device))

    def _normal(self, *shape: int) -> Tensor:
        numbers = torch.randn(shape, generator=self._generator, dtype=torch.float64, device=self._generator.device)
        return numbers.to(self._device, self._dtype)

    def _endless_order(self) -> Iterator[int]:
        """The examples in a random order, again and again."""
        while True:
            yield from torch.randperm(self.count, generator=self._generator, device=self._generator.device).tolist()


def _require_real(model: nn.Module) -> None:
    aliases(model)  # refuses what is no module
    trainable = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    if not trainable:
        raise FrozenParameterError(
            "the model has no parameter that requires gradients: a symmetry acts on what is trained, so there is "
            "none to be found. Unfreeze parameters with requires_grad_()"
        )
    complex_names = [name for name, tensor in trainable.items() if tensor.is_complex()]
    if complex_names:
        raise SettingsError(
            f"the parameters {complex_names} are complex, and the discovery of symmetries draws real numbers: store "
            "real and imaginary parts as two real parameters, or freeze these parameters with requires_grad_(False)"
        )


def _is_mask(buffer: Tensor) -> bool:
    values = set(buffer.unique().tolist())
    return values == {0.0, 1.0}


def _is_continuous(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()


@contextmanager
def _explained() -> Iterator[None]:
    """A block in which an error of the user's model or loss becomes a `LossError` with a sentence."""
    try:
        yield
    except NoetherflowError:
        raise
    except Exception as error:
        line = next((text.strip() for text in str(error).splitlines() if text.strip()), "no message")
        raise LossError(
            f"loss(model, batch) fails on a copy of the model at random parameters: {type(error).__name__}: {line}"
        ) from error
