"""What every symmetry can do, whatever its group."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple, final

from torch import Tensor

from noetherflow._types import Params
from noetherflow.symmetry.axis import Axis


@final
class Action(Enum):
    """How a symmetry acts: it decides which statistics of the noise are measured and how the equilibrium is solved.

    Examples:
        >>> import noetherflow as nf
        >>> nf.MatrixSymmetry(plus=[nf.Axis("w", 0)], minus=[nf.Axis("u", 1)]).action.name
        'MIXES_ROWS'
    """

    SCALES_ENTRIES = "every generator is a diagonal matrix: entries of tensors are scaled, none is mixed with another"
    MIXES_ROWS = "a symmetric matrix multiplies the rows of axes"
    SCALES_EIGENSPACES = "one generator, given by its eigenspaces; it may mix entries of several tensors"


class Grams(NamedTuple):
    """The squared size of a vector in the expanding and in the contracting directions of a symmetry.

    Numbers for a scaling, an entry per row for a rescaling, a Gram matrix for a double rotation, and an entry per
    eigenvalue for a generator that is given as a matrix.

    Examples:
        >>> import torch, noetherflow as nf
        >>> pair = nf.ScalarSymmetry(plus=[nf.Axis("u", 0)], minus=[nf.Axis("w", 0)])
        >>> pair.grams({"u": torch.tensor([3.0, 4.0]), "w": torch.tensor([1.0])})
        Grams(plus=tensor(25.), minus=tensor(1.))
    """

    plus: Tensor
    minus: Tensor


class Symmetry(ABC):
    r"""A group of linear maps $\theta \to \exp(Q_x)\,\theta$ of the parameters, $Q_x$ symmetric, that changes no loss.

    The coordinates `x` of an element are a number, a vector or a symmetric matrix, depending on the group; `v` is
    any set of tensors with the names and shapes of the parameters. A gradient at $\exp(Q_x)\theta$ is $\exp(-Q_x)$
    times the gradient at $\theta$.

    The class is an interface. The package asks a symmetry through these methods alone, so a group of your own needs no
    change elsewhere: derive it from `AxisSymmetry` if it acts along axes of tensors, and from `Symmetry` otherwise.

    Examples:
        >>> import torch, noetherflow as nf
        >>> pair: nf.Symmetry = nf.ScalarSymmetry(plus=[nf.Axis("u", 0)], minus=[nf.Axis("w", 0)])
        >>> theta = {"u": torch.tensor([2.0]), "w": torch.tensor([3.0])}
        >>> moved = pair.act(torch.tensor(0.5), theta)
        >>> bool(torch.isclose(moved["u"] * moved["w"], theta["u"] * theta["w"]))
        True

    Source: Ziyin et al. (2024), the definition of an exponential symmetry.
    """

    @property
    @abstractmethod
    def action(self) -> Action:
        """How the group acts. A symmetry that scales entries or mixes rows is an `AxisSymmetry`."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The parameters on which the group acts."""

    @property
    @abstractmethod
    def eigenvalues(self) -> Grams:
        """The eigenvalues of the generator to which the entries of `grams` belong, plus positive and minus negative."""

    @abstractmethod
    def regions(self, v: Params) -> tuple[Axis, ...]:
        """The slices of tensors on which the group acts, one per role."""

    @abstractmethod
    def check(self, v: Params) -> None:
        """Raise if the symmetry does not fit the names and shapes of `v`."""

    @abstractmethod
    def dimension(self, v: Params) -> int:
        """Number of independent generators, for tensors of the shapes of `v`."""

    @abstractmethod
    def identity(self, v: Params) -> Tensor:
        """The coordinates of the identity: zeros of the right shape."""

    @abstractmethod
    def act(self, x: Tensor, v: Params) -> dict[str, Tensor]:
        r"""The finite transformation $\exp(Q_x)\,v$; tensors on which the group does not act are returned unchanged."""

    @abstractmethod
    def generate(self, x: Tensor, v: Params) -> dict[str, Tensor]:
        r"""The infinitesimal transformation $Q_x v$, of the names and shapes of `v`."""

    @abstractmethod
    def grams(self, v: Params, *, batched: bool = False) -> Grams:
        """Squared sizes of `v` on both sides; with `batched`, summed over a leading example dimension."""

    @abstractmethod
    def charge_of(self, grams: Grams) -> Tensor:
        """The charge that belongs to given squared sizes; linear."""

    @abstractmethod
    def example_charges(self, v: Params) -> Grams:
        """Both halves of the charge of every example of a leading dimension: shape (B,), or (B, n) for n rows."""

    @abstractmethod
    def rename(self, names: Mapping[str, str]) -> "Symmetry":
        """This symmetry on renamed parameters; names that are not in the mapping are kept."""

    @property
    def label(self) -> str:
        """The word for this kind of symmetry in tables: the name of the class, without `Symmetry`."""
        return type(self).__name__.removesuffix("Symmetry").lower()

    def charge(self, v: Params) -> Tensor:
        r"""The Noether charge. For a parameter vector $C = \theta^T Q \theta$, which gradient flow conserves.

        Being quadratic, the form $C(\cdot)$ also gives the exact change of the charge in a step of SGD,
        $\mathrm{lr}^2 C(g_S)$, and $\mathrm{Tr}[\Sigma Q] = E[C(g)] - C(E g)$.

        Returns:
            The charge, of the shape of the coordinates.
        """
        self.check(v)
        return self.charge_of(self.grams(v))
