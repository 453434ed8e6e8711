"""The change of a charge and its parts: the quadratic form of a symmetry at two arguments."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import final

import torch
from torch import Tensor

from noetherflow._device import CPU, joined
from noetherflow._errors import NotASymmetryError
from noetherflow._types import Params
from noetherflow.symmetry import Symmetry

# Relative error of 2 C(theta) by differentiation, in float64, above which a charge is no quadratic form.
_TOLERANCE = 1e-9


@final
@dataclass(frozen=True, eq=False)
class ChargeParts:
    r"""The change of a charge and the parts that add up to it, tensors of the shape of the charge, float64.

    A step moves the parameters $\theta$ by $d = u + r$, where u is weight decay. With the charge C, and B its bilinear
    form, $C(v) = B(v, v)$,

    $$C(\theta + d) - C(\theta) = \underbrace{2B(\theta,u) + C(u)}_{\text{decay}} +
    \underbrace{2B(\theta + u, r)}_{\text{broken}} + \underbrace{C(r)}_{\text{noise + mean, or kick}} .$$

    `change` is the difference of two charges. The parts are computed without it, so `change` is equal to their sum
    up to rounding.

    Args:
        change: The change of the charge.
        decay: The part of weight decay.
        noise: The estimated kick of the gradient noise, in steps in which a meter measured the noise.
        mean: The kick of the mean gradient, $C(r)$ - noise, in these steps.
        kick: $C(r)$, noise and mean together, in all other steps that were split.
        broken: The part by which the optimizer itself breaks the symmetry.
        between: The change outside of the steps that were split.

    Examples:
        >>> import torch, noetherflow as nf
        >>> pair = nf.ScalarSymmetry(plus=[nf.Axis("0.weight", 0)], minus=[nf.Axis("1.weight", 0)])
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(1, 1, bias=False)).double()
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.01)
        >>> account = nf.ChargeLedger(net, {"pair": pair}, optimizer)
        >>> net(torch.ones(3, 2, dtype=torch.float64)).square().mean().backward()
        >>> with account.step():
        ...     optimizer.step()
        >>> parts = account.totals["pair"]
        >>> bool((parts.decay + parts.kick + parts.broken - parts.change).abs() < 1e-15)
        True

    Source: Ziyin et al. (2024) for the charge; the split is this package's own.
    """

    change: Tensor
    decay: Tensor
    noise: Tensor
    mean: Tensor
    kick: Tensor
    broken: Tensor
    between: Tensor

    @classmethod
    def zeros(cls, like: Tensor) -> "ChargeParts":
        """No change, of the shape of a charge."""
        return cls(*(torch.zeros_like(like) for _ in fields(cls)))

    def plus(self, other: "ChargeParts") -> "ChargeParts":
        """The parts of both changes together."""
        return ChargeParts(*(mine + theirs for (_, mine), (_, theirs) in zip(self.items(), other.items(), strict=True)))

    def items(self) -> list[tuple[str, Tensor]]:
        """Names and tensors of all parts, `change` first."""
        return [(part.name, getattr(self, part.name)) for part in fields(self)]


def split(
    symmetries: Mapping[str, Symmetry], theta: Params, shrinkage: Params, rest: Params
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    r"""The parts of the change of each charge in a step $\theta \to \theta + u + r$.

    Args:
        symmetries: By name.
        theta: The parameters before the step, float64.
        shrinkage: The displacement u by weight decay.
        rest: All other displacement r.

    Returns:
        By symmetry the parts decay, broken and kick, of the shape of the charge, on the CPU.
    """
    decayed = {name: tensor + shrinkage[name] for name, tensor in theta.items()}
    kicks, broken = forms(symmetries, rest, decayed)
    decays = {name: torch.zeros_like(kick) for name, kick in kicks.items()}
    if any(displacement.any() for displacement in shrinkage.values()):
        squares, mixed = forms(symmetries, shrinkage, theta)
        decays = {name: squares[name] + mixed[name] for name in symmetries}
    return {name: (decays[name].to(CPU), broken[name].to(CPU), kicks[name].to(CPU)) for name in symmetries}


def forms(symmetries: Mapping[str, Symmetry], v: Params, w: Params) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    r"""Charges $C(v)$, and $2B(v, w)$: their derivatives at v along w, which involve no difference of large numbers.

    Args:
        symmetries: By name.
        v: Tensors with the names of the parameters on which the symmetries act.
        w: Tensors of these shapes.

    Returns:
        By symmetry, two tensors of the shape of its charge.
    """
    # Two derivatives backward: the first is linear in placeholders of the shapes of the charges, and its derivatives
    # by the placeholders are those along w. Forward mode would compile functions of PyTorch at its first use.
    with torch.enable_grad():
        points = {name: v[name].detach().requires_grad_() for s in symmetries.values() for name in s.names}
        charges = {name: symmetry.charge(points) for name, symmetry in symmetries.items()}
        placeholders = [torch.zeros_like(charge, requires_grad=True) for charge in charges.values()]
        slopes = torch.autograd.grad(
            list(charges.values()), list(points.values()), placeholders, create_graph=True, materialize_grads=True
        )
        along = [(slope * w[name]).sum() for name, slope in zip(points, slopes, strict=True)]
        derivatives = torch.autograd.grad(torch.stack(joined(along)).sum(), placeholders)
    values = {name: charge.detach() for name, charge in charges.items()}
    return values, dict(zip(charges, derivatives, strict=True))


def require_quadratic(symmetries: Mapping[str, Symmetry], theta: Params) -> None:
    """Raise unless PyTorch can differentiate every charge, and the derivative is that of a quadratic form.

    Args:
        symmetries: By name.
        theta: The parameters, float64.

    Raises:
        NotASymmetryError: If a charge is no quadratic form, or consists of functions without a derivative.
    """
    for name, symmetry in symmetries.items():
        sides = symmetry.grams(theta)
        try:
            charges, doubled = forms({name: symmetry}, theta, theta)
            error = (doubled[name] - 2 * charges[name]).abs().max()
        except RuntimeError as cause:
            raise NotASymmetryError(
                f"the charge of symmetry {name!r} ({type(symmetry).__name__}) cannot be differentiated "
                f"({cause}): write it with functions of PyTorch"
            ) from cause
        if not error <= _TOLERANCE * sum(side.abs().sum() for side in sides):
            raise NotASymmetryError(
                f"the charge of symmetry {name!r} ({type(symmetry).__name__}) is no quadratic form: its derivative at "
                f"the parameters, along the parameters, differs from twice the charge by {error:.3g}"
            )
