"""Settings by parameter: read from the parameter groups of an optimizer, and named after the parameters of a model.

A setting, such as a weight decay, is a number, a mapping from names of parameters, or a `ByTensor` until a model gives
the names.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, Never, TypeVar, final

import torch
from torch import Tensor, nn

from noetherflow._errors import SettingsError
from noetherflow._types import Params

T = TypeVar("T")
Setting = float | Mapping[str, float]


@final
class ByTensor(Mapping[str, T], Generic[T]):
    """A setting of every parameter group, whose parameters have no names yet: reading it by name is an error.

    The tensors are held by weak references, so that settings keep no model in memory.

    Args:
        words: What the setting is, such as "weight decay".
        groups: Tensors and the setting of each group.
    """

    def __init__(self, words: str, groups: Sequence[tuple[Sequence[Tensor], T]]) -> None:
        self.words = words
        self.values_of_groups = tuple(value for _, value in groups)
        self._entries = [(weakref.ref(tensor), value) for tensors, value in groups for tensor in tensors]

    def named(self, tensors: Params) -> dict[str, T]:
        """The setting, by name, of those of the given tensors that are in the groups."""
        alive = [(reference(), value) for reference, value in self._entries]
        values = {id(tensor): value for tensor, value in alive if tensor is not None}
        return {name: values[id(tensor)] for name, tensor in tensors.items() if id(tensor) in values}

    def __getitem__(self, name: str) -> Never:
        raise self.nameless()

    def nameless(self) -> SettingsError:
        """The error of a setting whose names are not known."""
        return SettingsError(
            f"the parameter groups have different {self.words}, and the names of their parameters are not known here: "
            "from_optimizer(optimizer, batch_size=..., model=model) reads them from the model"
        )

    def __iter__(self) -> Iterator[str]:
        raise self.nameless()

    def __len__(self) -> int:
        return len(self._entries)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"<by group: {', '.join(map(repr, self.values_of_groups))}>"

    def __deepcopy__(self, memo: object) -> "ByTensor[T]":
        return self  # a copy has to refer to these tensors, and nothing changes them

    def __reduce__(self) -> Never:
        raise self.nameless()


def entries_of(setting: T | Mapping[str, T], key: str) -> dict[str, T]:
    """Every number of a setting by its place, such as `weight_decay['w']`; raises if a key is not a name.

    Args:
        setting: The setting.
        key: Its name as an argument, such as "weight_decay".

    Returns:
        The numbers by their places.

    Raises:
        SettingsError: If a key is not a name.
    """
    if isinstance(setting, ByTensor):
        return {f"{key} of group {group}": value for group, value in enumerate(setting.values_of_groups)}
    if not isinstance(setting, Mapping):
        return {key: setting}
    for name in setting:
        if not isinstance(name, str):
            raise SettingsError(f"{key} must be given by the names of parameters, got the key {name!r}")
    return {f"{key}[{name!r}]": value for name, value in setting.items()}


def kept(setting: T | Mapping[str, T]) -> T | Mapping[str, T]:
    """A setting in plain numbers, which stays as it is if the user changes the given dictionary."""
    if isinstance(setting, ByTensor):
        return setting
    if isinstance(setting, Mapping):
        return {name: number(value) for name, value in setting.items()}
    plain: T = number(setting)
    return plain


def of_groups(groups: Sequence[Mapping[str, Any]], key: str, model: nn.Module | None) -> Any:
    """A setting of parameter groups: a number if it is equal for all parameters, and by parameter otherwise.

    Args:
        groups: The parameter groups of an optimizer, or of a state dict, which have `param_names` if these are known.
        key: The setting, such as "weight_decay".
        model: The model that gives the names; None takes them from the optimizer, where it has names.

    Returns:
        A number; a mapping from names; or a `ByTensor`.
    """
    values = [number(group[key]) for group in groups]
    equal = all(value == values[0] for value in values)
    numbered = not all(isinstance(entry, Tensor) for group in groups for entry in group["params"])
    by_tensor = ByTensor(
        words_of(key), [([] if numbered else g["params"], v) for g, v in zip(groups, values, strict=True)]
    )
    by_name = {n: v for group, v in zip(groups, values, strict=True) for n in group.get("param_names", ())}
    if model is not None:
        # The names in a state dict are those of this model; an optimizer may have been made from a wrapped model.
        named = by_name if numbered else by_names(by_tensor, model, key)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        # A number holds for all parameters, and a parameter outside of all groups does not move.
        return values[0] if equal and isinstance(named, Mapping) and all(name in named for name in trained) else named
    if equal:
        return values[0]
    if all("param_names" in group for group in groups):
        return by_name
    if numbered:
        raise by_tensor.nameless()
    return by_tensor


def by_names(setting: T | Mapping[str, T], params: nn.Module | Params, key: str) -> T | Mapping[str, T]:
    """A setting by the names of `named_parameters()`; a number stays a number.

    Args:
        setting: The setting.
        params: The model, or its tensors by name.
        key: The setting as an argument, such as "weight_decay".

    Returns:
        The setting. Parameters in no parameter group are left out.

    Raises:
        SettingsError: If no parameter is in a group, or if a tied weight has two values.
    """
    if not isinstance(setting, Mapping):
        return setting
    tensors = dict(params.named_parameters()) if isinstance(params, nn.Module) else params
    if isinstance(setting, ByTensor):
        named = setting.named(tensors)
        if not named:
            raise SettingsError(
                "the parameter groups of the optimizer hold none of these tensors, which are copies or belong to "
                "another model: from_optimizer(optimizer, batch_size=..., model=model) reads the names from the "
                "model that the optimizer trains"
            )
        return named
    return setting if not isinstance(params, nn.Module) else _canonical(setting, params, key)


def value_of(setting: T | Mapping[str, T], name: str, key: str) -> T:
    """The number of a setting that holds for a parameter.

    Args:
        setting: The setting.
        name: The name of the parameter.
        key: The setting as an argument, such as "weight_decay".

    Returns:
        The number.

    Raises:
        SettingsError: If the setting is given by parameter and does not name this parameter.
    """
    if not isinstance(setting, Mapping):
        return setting
    if name not in setting:
        raise SettingsError(
            f"the parameter {name!r} has no {words_of(key)}: {key} names {sorted(setting)}. If the optimizer trains "
            "the parameter, name it there, or add it to a parameter group of the optimizer; if not, call "
            "requires_grad_(False) on it, so that no symmetry moves it"
        )
    return setting[name]


def words_of(key: str) -> str:
    """A setting in words."""
    return {"lr": "learning rate"}.get(key, key.replace("_", " "))


def _canonical(setting: Mapping[str, T], model: nn.Module, key: str) -> dict[str, T]:
    """A setting in which a tied weight has its first name, by whichever of its names it was given."""
    canonical = {id(tensor): name for name, tensor in model.named_parameters()}
    aliases = {alias: canonical[id(tensor)] for alias, tensor in model.named_parameters(remove_duplicate=False)}
    result: dict[str, T] = {}
    for alias, value in setting.items():
        name = aliases.get(alias, alias)
        if result.setdefault(name, value) != value:
            raise SettingsError(
                f"{name!r} and {alias!r} are names of a single tensor, for which {key} has the values {result[name]} "
                f"and {value}: give equal values"
            )
    return result


def number(value: Any) -> Any:
    """A setting of an optimizer as a number, or as several numbers, also if the optimizer holds tensors."""
    if isinstance(value, tuple | list):
        return tuple(map(number, value))
    return value.item() if isinstance(value, Tensor) else value


def innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside wrappers that keep it as `.optimizer`, such as those of Accelerate and Lightning."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer
