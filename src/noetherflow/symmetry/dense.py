"""A generator given as a matrix on the flattened parameters: declared by hand, or discovered numerically."""

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from noetherflow import _spd
from noetherflow._device import CPU, joined
from noetherflow._errors import ParameterShapeError
from noetherflow._params import require_names
from noetherflow._types import Params
from noetherflow.symmetry.axis import Axis
from noetherflow.symmetry.base import Action, Grams, Symmetry

# Eigenvalues closer than this fraction of the largest count as equal.
_SAME = 1e-9


@final
class DenseSymmetry(Symmetry):
    r"""One generator, a symmetric matrix $Q$ on the flattened named parameters: $\theta \to e^{xQ}\theta$.

    Args:
        generator: Q, symmetric, shape (n, n), where n counts the entries of the named parameters in the order given.
        names: The parameters on which the generator acts; each is flattened row by row.

    Raises:
        ParameterShapeError: If the generator is not a finite, non-zero, symmetric square matrix.

    Examples:
        A neuron with a squared ReLU has incoming and outgoing weights that scale as $e^{x}$ and $e^{-2x}$.

        >>> import torch, noetherflow as nf
        >>> neuron = nf.DenseSymmetry(torch.diag(torch.tensor([1.0, -2.0])), names=("w", "u"))
        >>> neuron.charge({"w": torch.tensor([2.0]), "u": torch.tensor([1.0])}).item()
        2.0

    Source: Ziyin et al. (2024), the definition of an exponential symmetry.
    """

    def __init__(self, generator: Tensor, names: Sequence[str]) -> None:
        matrix = torch.as_tensor(generator).detach().to(CPU, torch.float64)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ParameterShapeError(f"a generator is a square matrix, got shape {tuple(matrix.shape)}")
        asymmetry, scale = (matrix - matrix.mT).abs().max(), matrix.abs().max()
        if not (torch.isfinite(matrix).all() and scale > 0 and asymmetry <= 1e-6 * scale):
            raise ParameterShapeError(
                f"a generator is a finite, non-zero, symmetric matrix; got largest entry {scale:.3g}, asymmetry "
                f"{asymmetry:.3g}. An antisymmetric generator is a rotation, which moves no norm and has no charge: "
                "give (Q + Q.T) / 2"
            )
        self._names = (names,) if isinstance(names, str) else tuple(names)
        self._generator = _spd.symmetric(matrix)
        values, self._vectors = torch.linalg.eigh(self._generator)
        # Eigenvalues in clusters of equals: the distinct non-zero eigenvalues, and the eigenvectors of each.
        starts = torch.cat([torch.ones(1, dtype=torch.bool), values.diff() > _SAME * scale])
        cluster = starts.cumsum(0) - 1
        distinct = torch.stack([values[cluster == k].mean() for k in range(int(cluster[-1]) + 1)])
        members = torch.nn.functional.one_hot(cluster, len(distinct)).to(torch.float64)
        signs = (distinct > _SAME * scale, distinct < -_SAME * scale)
        self._eigenvalues = Grams(*(distinct[sign] for sign in signs))
        self._members = Grams(*(members[:, sign] for sign in signs))
        self._spectrum = values

    @property
    def generator(self) -> Tensor:
        """Q, shape (n, n), float64."""
        return self._generator

    @property
    def action(self) -> Action:
        """Eigenspaces are scaled."""
        return Action.SCALES_EIGENSPACES

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters on which the generator acts, in the order of its rows."""
        return self._names

    @property
    def eigenvalues(self) -> Grams:
        """The distinct positive and the distinct negative eigenvalues, in the order of `grams`."""
        return self._eigenvalues

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DenseSymmetry):
            return NotImplemented
        return self._names == other._names and torch.equal(self._generator, other._generator)

    def __hash__(self) -> int:
        return hash((self._names, self._generator.shape))

    def __repr__(self) -> str:
        return f"DenseSymmetry(generator=<{tuple(self._generator.shape)}>, names={self._names})"

    def regions(self, v: Params) -> tuple[Axis, ...]:
        """Every tensor, all of it."""
        return tuple(Axis(name, 0) for name in self._names)

    def check(self, v: Params) -> None:
        """Raise if a parameter is missing or the sizes do not add up."""
        require_names(v, self._names, "DenseSymmetry")
        sizes = {name: v[name].numel() for name in self._names}
        if sum(sizes.values()) != len(self._generator):
            raise ParameterShapeError(
                f"the generator acts on {len(self._generator)} numbers, but {sizes} hold {sum(sizes.values())}"
            )

    def dimension(self, v: Params) -> int:
        """One generator."""
        return 1

    def identity(self, v: Params) -> Tensor:
        """Zero, shape ()."""
        return v[self._names[0]].new_zeros(())

    def act(self, x: Tensor, v: Params) -> dict[str, Tensor]:
        """The finite transformation; tensors on which the generator does not act are returned unchanged."""
        self.check(v)
        x = torch.as_tensor(x, dtype=torch.float64, device=CPU)
        exponential = (self._vectors * torch.exp(x * self._spectrum)) @ self._vectors.mT
        return dict(v) | self._multiply(exponential, v)

    def generate(self, x: Tensor, v: Params) -> dict[str, Tensor]:
        """The infinitesimal transformation, zero on tensors on which the generator does not act."""
        self.check(v)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in v.items()}
        return zeros | self._multiply(torch.as_tensor(x, dtype=torch.float64, device=CPU) * self._generator, v)

    def grams(self, v: Params, *, batched: bool = False) -> Grams:
        """The squared length in every eigenspace, shape (k,), positive and negative eigenvalues apart."""
        sides = self._squares(v, int(batched))
        return Grams(sides.plus.sum(0), sides.minus.sum(0)) if batched else sides

    def charge_of(self, grams: Grams) -> Tensor:
        """The eigenvalues times the squared lengths, shape ()."""
        halves = self._weighted(grams)
        return halves.plus - halves.minus

    def example_charges(self, v: Params) -> Grams:
        """Both halves of every example's charge, shape (B,)."""
        return self._weighted(self._squares(v, 1))

    def rename(self, names: Mapping[str, str]) -> "DenseSymmetry":
        """This generator on renamed parameters."""
        return DenseSymmetry(self._generator, [names.get(name, name) for name in self._names])

    def _squares(self, v: Params, batch_dims: int) -> Grams:
        flat = self._flatten(v, batch_dims)
        squares = (flat @ self._vectors.to(flat)).square()
        return Grams(*(squares @ members.to(flat) for members in self._members))

    def _weighted(self, grams: Grams) -> Grams:
        return Grams(*((q.abs().to(side) * side).sum(-1) for q, side in zip(self._eigenvalues, grams, strict=True)))

    def _flatten(self, v: Params, batch_dims: int) -> Tensor:
        tensors = joined(v[name] for name in self._names)
        return torch.cat([tensor.reshape(*tensor.shape[:batch_dims], -1) for tensor in tensors], dim=-1)

    def _multiply(self, matrix: Tensor, v: Params) -> dict[str, Tensor]:
        flat = self._flatten(v, 0)
        parts = (matrix.to(flat) @ flat).split([v[name].numel() for name in self._names])
        # A real parameter beside a complex parameter remains real.
        kept = [part if v[name].is_complex() else part.real for name, part in zip(self._names, parts, strict=True)]
        return {n: part.reshape(v[n].shape).to(v[n].device) for n, part in zip(self._names, kept, strict=True)}
