"""What every symmetry can do, whatever its group."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from noetherflow._types import Params
from noetherflow.symmetry.axis import Axis


class Grams(NamedTuple):
    """All that a symmetry needs to know of a vector: its squared size in expanding and in contracting directions.

    Numbers for a scaling, one entry per row for a rescaling, a whole Gram matrix for a rotation, and one entry per
    eigenvalue for a generator given as a matrix.

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
    anything with the names and shapes of the parameters. A gradient at $\exp(Q_x)\theta$ is $\exp(-Q_x)$ times the
    gradient at $\theta$.

    Examples:
        >>> import torch, noetherflow as nf
        >>> pair: nf.Symmetry = nf.ScalarSymmetry(plus=[nf.Axis("u", 0)], minus=[nf.Axis("w", 0)])
        >>> theta = {"u": torch.tensor([2.0]), "w": torch.tensor([3.0])}
        >>> moved = pair.act(torch.tensor(0.5), theta)
        >>> bool(torch.isclose(moved["u"] * moved["w"], theta["u"] * theta["w"]))
        True
    """

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The parameters on which the group acts."""

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
        r"""The finite transformation $\exp(Q_x)\,v$; tensors that the group does not move are passed on."""

    @abstractmethod
    def generate(self, x: Tensor, v: Params) -> dict[str, Tensor]:
        r"""The infinitesimal transformation $Q_x v$, of the same names and shapes as `v`."""

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
        """The same symmetry on renamed parameters; names that are not in the mapping are kept."""

    def charge(self, v: Params) -> Tensor:
        r"""The Noether charge. For a parameter vector $C = \theta^T Q \theta$, which gradient flow conserves.

        Being quadratic, the same form gives the exact move of the charge in one SGD step, $\mathrm{lr}^2 C(g_S)$, and
        $\mathrm{Tr}[\Sigma Q] = E[C(g)] - C(E g)$.

        Returns:
            The charge, of the shape of the coordinates.
        """
        self.check(v)
        return self.charge_of(self.grams(v))
