"""The parameters on which symmetries act: copies, charges, gradients."""

from collections.abc import Iterable, Mapping
from typing import final

import torch
from torch import Tensor, nn

from noetherflow._device import CPU, require_float64
from noetherflow._errors import SettingsError
from noetherflow._params import canonical_names, in_dtype, snapshot
from noetherflow._types import Params
from noetherflow.ledger.parts import require_quadratic
from noetherflow.noise.sharded import gathered
from noetherflow.symmetry import Symmetry


@final
class Tracked:
    """The symmetries of a model with canonical names, and the parameters on which they act.

    Args:
        model: The model.
        symmetries: By name.

    Raises:
        SettingsError: If there is no symmetry, if it acts on complex parameters, or if a device has no float64.
        ParameterNameError: If a symmetry names a parameter that the model does not have.
        NotASymmetryError: If a charge is no quadratic form.
    """

    def __init__(self, model: nn.Module, symmetries: Mapping[str, Symmetry]) -> None:
        if not isinstance(symmetries, Mapping) or not symmetries:
            raise SettingsError(
                "symmetries is a mapping from your names to at least one symmetry, such as that of "
                f"nf.find_symmetries, got {symmetries!r:.60}"
            )
        self.symmetries = {
            name: symmetry.rename(canonical_names(model, symmetry.names, f"symmetry {name!r}"))
            for name, symmetry in symmetries.items()
        }
        named = dict(model.named_parameters())
        self.params = {name: named[name] for s in self.symmetries.values() for name in s.names}
        if pairs := [name for name, parameter in self.params.items() if parameter.is_complex()]:
            raise SettingsError(
                f"the charges of complex parameters are not computed: {pairs}. Store them as real tensors with a last "
                "dimension of 2, and call torch.view_as_complex in forward"
            )
        require_float64(parameter.device for parameter in self.params.values())
        theta = self.theta()
        for symmetry in self.symmetries.values():
            symmetry.check(theta)
        require_quadratic(self.symmetries, theta)

    def theta(self) -> dict[str, Tensor]:
        """Copies of the parameters in float64; shards are gathered."""
        return snapshot({name: gathered(parameter) for name, parameter in self.params.items()})

    def charges(self, theta: Params) -> dict[str, Tensor]:
        """The charges by symmetry, float64, on the CPU."""
        return {name: symmetry.charge(theta).to(CPU) for name, symmetry in self.symmetries.items()}

    def gradients(self) -> dict[str, Tensor]:
        """`.grad` of the parameters that have it: no copies."""
        return {name: parameter.grad for name, parameter in self.params.items() if parameter.grad is not None}

    def require_trained_by(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Raise `SettingsError` unless the optimizers hold at least one of the parameters."""
        given = list(optimizers)
        held = {id(p) for optimizer in given for group in optimizer.param_groups for p in group["params"]}
        if not any(id(parameter) in held for parameter in self.params.values()):
            kinds = ", ".join(type(optimizer).__name__ for optimizer in given)
            raise SettingsError(
                f"the optimizer ({kinds or 'none given'}) holds none of the {len(self.params)} parameters on which "
                "the symmetries act: it may belong to a copy of the model; give the optimizer that was made from "
                "model.parameters()"
            )


def full(gradient: Tensor) -> Tensor:
    """A gradient as a dense tensor in float64, put together from its shards."""
    return in_dtype(gathered(gradient.detach()).to_dense(), torch.float64)
