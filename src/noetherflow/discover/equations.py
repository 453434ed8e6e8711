r"""The equations $\nabla\ell(\theta, z) \cdot A\theta = 0$ at points and examples drawn anew, and what solves them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from noetherflow._batch import cast, is_per_example, tensors_of, with_tensors
from noetherflow._errors import FrozenParameterError
from noetherflow._model_function import ModelFunction
from noetherflow._per_example import own_randomness, require_losses
from noetherflow._progress import track
from noetherflow._types import Batch, Loss

# Beyond this many unknowns the null space takes minutes and gigabytes.
MOST_UNKNOWNS = 6400
# Singular values below this share of the largest are zero, above it are not, and in between nobody can say.
ZERO = 1e-11
CLEAR = 1e-7
_MOST_AT_ONCE = 512
_MOST_NUMBERS = 20_000_000

Tensors = dict[str, Tensor]
Features = Callable[[Tensors, Tensors], Tensor]


def enough(unknowns: int) -> int:
    """How many equations determine so many unknowns, with some to spare."""
    return int(1.15 * unknowns) + 60


@final
class Draws:
    """Parameters and examples drawn anew for every equation, in float64."""

    def __init__(self, model: nn.Module, loss: Loss, batch: Batch, generator: torch.Generator | None) -> None:
        trainable = {name for name, one in model.named_parameters() if one.requires_grad}
        if not trainable:
            raise FrozenParameterError(
                "the model has no parameter that requires gradients: a symmetry acts on what is trained, so there is "
                "none to be found. Unfreeze parameters with requires_grad_()"
            )
        self._function = ModelFunction(model, loss, torch.float64)
        self._params = self._function.trained
        self._generator = generator or torch.Generator().manual_seed(0)
        self.names = tuple(self._params)
        self.shapes = {name: one.shape for name, one in self._params.items()}
        self.size = sum(one.numel() for one in self._params.values())
        device = next(iter(self._params.values())).device
        self._batch = cast(batch, torch.float64, device)
        with own_randomness(device, seed=0):
            self._examples = require_losses(self._function.losses(self._params, self._batch), "this search")

    def rows(self, count: int, features: Features, what: str, progress: bool) -> Tensor:
        """A function of the parameters drawn and the gradients there, both with a leading axis of equations."""
        chunks = self._chunks(count)
        return torch.cat(
            [features(*self._chunk(one)) for one in track(chunks, what, total=len(chunks), shown=progress)]
        )

    def pretend(self, count: int, features: Features) -> Tensor:
        """The same of numbers that are no gradients: what solves these equations solves them for any loss."""
        return torch.cat([features(self._normals(one), self._normals(one)) for one in self._chunks(count)])

    def _chunks(self, count: int) -> list[int]:
        most = max(1, min(_MOST_AT_ONCE, _MOST_NUMBERS // self.size))
        return [min(most, count - start) for start in range(0, count, most)]

    def _normals(self, count: int) -> Tensors:
        return {name: self._normal(count, *shape) for name, shape in self.shapes.items()}

    def _chunk(self, count: int) -> tuple[Tensors, Tensors]:
        drawn = self._normals(count)
        chosen = torch.randint(self._examples, (count,), generator=self._generator)
        examples = []
        for leaf in tensors_of(self._batch):
            if not is_per_example(leaf, self._examples):
                examples.append(leaf.expand(count, *leaf.shape))
            elif leaf.is_floating_point():
                examples.append(self._normal(count, 1, *leaf.shape[1:]))
            else:
                examples.append(leaf[chosen].unsqueeze(1))

        return drawn, self._function.gradients_at(drawn, examples, lambda leaves: with_tensors(self._batch, leaves))

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)


@final
@dataclass(frozen=True, eq=False)
class NullSpace:
    """Vectors that solve the equations, orthonormal, shape (k, unknowns), and how clearly they do."""

    vectors: Tensor
    gap: tuple[float, float]

    @property
    def decided(self) -> bool:
        """Whether what was taken for zero and what was not are far apart."""
        return not len(self.vectors) or self.gap[0] < ZERO < CLEAR < self.gap[1]


def null_space(rows: Tensor, trivial: Tensor | None = None) -> NullSpace:
    """What is orthogonal to every row, less a space of trivial solutions if one is given."""
    unknowns = rows.shape[1]
    if not unknowns:
        return NullSpace(rows.new_zeros(0, 0), (0.0, 1.0))
    _, upper = torch.linalg.qr(rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300), mode="r")
    _, values, right = torch.linalg.svd(upper)
    relative = values / values[0].clamp_min(1e-300)
    count = int((relative < math.sqrt(ZERO * CLEAR)).sum())
    vectors = right[unknowns - count :]
    gap = (
        float(relative[unknowns - count :].max()) if count else 0.0,
        float(relative[unknowns - count - 1]) if count < unknowns else 1.0,
    )
    if trivial is not None and len(trivial):
        _, shares, turned = torch.linalg.svd(trivial @ vectors.T, full_matrices=True)
        vectors = turned[int((shares > 1e-6).sum()) :] @ vectors
    return NullSpace(vectors, gap)


def part(blocks: Sequence[Tensor], sign: float) -> list[Tensor]:
    """Of a space of generators, each a matrix for every block, those whose matrices all have X = +-X^T."""
    count = len(blocks[0])
    if not count:
        return list(blocks)
    other = torch.cat([(block - sign * block.mT).flatten(1) for block in blocks], 1)
    left, values, _ = torch.linalg.svd(other, full_matrices=True)
    rank = int((values > 1e-6).sum())
    return [torch.einsum("ck,cij->kij", left[:, rank:], block) for block in blocks]
