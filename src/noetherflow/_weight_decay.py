"""Weight decay by parameter: read from the parameter groups of an optimizer, and named after the parameters of a model.

A weight decay is a number, a mapping from names of parameters, or a `DecayByTensor` until a model gives the names.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Never, final

from torch import Tensor, nn

from noetherflow._errors import SettingsError
from noetherflow._types import Params

WeightDecay = float | Mapping[str, float]


@final
class DecayByTensor(Mapping[str, float]):
    """The weight decay of every parameter group, whose parameters have no names yet: reading it by name is an error.

    The tensors are held by weak references, so that settings keep no model in memory.

    Args:
        groups: Tensors and weight decay of each group.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[Tensor], float]]) -> None:
        self.decays = tuple(decay for _, decay in groups)
        self._entries = [(weakref.ref(tensor), decay) for tensors, decay in groups for tensor in tensors]

    def named(self, tensors: Params) -> dict[str, float]:
        """The weight decay, by name, of those of the given tensors that are in the groups."""
        alive = [(reference(), decay) for reference, decay in self._entries]
        decays = {id(tensor): decay for tensor, decay in alive if tensor is not None}
        return {name: decays[id(tensor)] for name, tensor in tensors.items() if id(tensor) in decays}

    def __getitem__(self, name: str) -> Never:
        raise self._nameless()

    def _nameless(self) -> SettingsError:
        return SettingsError(
            "the parameter groups have different weight decay, and the names of their parameters are not known here: "
            "SGD.from_optimizer(optimizer, batch_size=..., model=model) reads them from the model"
        )

    def __iter__(self) -> Iterator[str]:
        raise self._nameless()

    def __len__(self) -> int:
        return len(self._entries)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"<by group: {', '.join(map(repr, self.decays))}>"

    def __deepcopy__(self, memo: object) -> "DecayByTensor":
        return self  # a copy has to refer to these tensors, and nothing changes them

    def __reduce__(self) -> Never:
        raise self._nameless()


def entries_of(decay: WeightDecay) -> dict[str, float]:
    """Every number of a weight decay by its place, such as `weight_decay['w']`; raises if a key is not a name."""
    if isinstance(decay, DecayByTensor):
        return {f"weight_decay of group {group}": value for group, value in enumerate(decay.decays)}
    if not isinstance(decay, Mapping):
        return {"weight_decay": decay}
    for key in decay:
        if not isinstance(key, str):
            raise SettingsError(f"weight_decay must be given by the names of parameters, got the key {key!r}")
    return {f"weight_decay[{name!r}]": value for name, value in decay.items()}


def of_groups(groups: Sequence[Mapping[str, Any]], model: nn.Module | None) -> WeightDecay:
    """The weight decay of parameter groups: a number if it is equal for all parameters, and by parameter otherwise.

    Args:
        groups: The parameter groups of an optimizer.
        model: The model that gives the names; None takes them from the optimizer, where it has names.

    Returns:
        A number; a mapping from names; or a `DecayByTensor`.
    """
    by_tensor = DecayByTensor([(group["params"], number(group["weight_decay"])) for group in groups])
    decays = by_tensor.decays
    equal = all(decay == decays[0] for decay in decays)
    if model is not None:
        named = by_names(by_tensor, model)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        # A number holds for all parameters, and a parameter outside of all groups does not move.
        return decays[0] if equal and isinstance(named, Mapping) and all(name in named for name in trained) else named
    if equal:
        return decays[0]
    if all("param_names" in group for group in groups):
        return {name: decay for group, decay in zip(groups, decays, strict=True) for name in group["param_names"]}
    return by_tensor


def by_names(decay: WeightDecay, params: nn.Module | Params) -> WeightDecay:
    """A weight decay by the names of `named_parameters()`; a number stays a number.

    Args:
        decay: The weight decay.
        params: The model, or its tensors by name.

    Returns:
        The weight decay. Parameters in no parameter group are left out.

    Raises:
        SettingsError: If no parameter is in a group, or if a tied weight has two weight decays.
    """
    if not isinstance(decay, Mapping):
        return decay
    tensors = dict(params.named_parameters()) if isinstance(params, nn.Module) else params
    if isinstance(decay, DecayByTensor):
        named = decay.named(tensors)
        if not named:
            raise SettingsError(
                "the parameter groups of the optimizer hold none of these tensors, which are copies or belong to "
                "another model: SGD.from_optimizer(optimizer, batch_size=..., model=model) reads the names from the "
                "model that the optimizer trains"
            )
        return named
    return decay if not isinstance(params, nn.Module) else _canonical(decay, params)


def _canonical(decay: Mapping[str, float], model: nn.Module) -> dict[str, float]:
    """A weight decay in which a tied weight has its first name, by whichever of its names it was given."""
    canonical = {id(tensor): name for name, tensor in model.named_parameters()}
    aliases = {alias: canonical[id(tensor)] for alias, tensor in model.named_parameters(remove_duplicate=False)}
    result: dict[str, float] = {}
    for alias, value in decay.items():
        name = aliases.get(alias, alias)
        if result.setdefault(name, value) != value:
            raise SettingsError(
                f"{name!r} and {alias!r} are names of a single tensor, which has the weight decays {result[name]} and "
                f"{value}: give equal values"
            )
    return result


def number(value: Any) -> Any:
    """A setting of an optimizer as a number, also if the optimizer holds it as a tensor."""
    return value.item() if isinstance(value, Tensor) else value
