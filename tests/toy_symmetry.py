"""A symmetry as a user may write it: its arguments are attributes, everything else is that of a scaling."""

import inspect
from typing import Any

import noetherflow as nf


def toy_of(base: type = nf.Symmetry) -> type:
    """A class that scales one tensor, with constructor arguments of its own."""
    namespace: dict[str, Any] = {name: _delegated(name) for name in base.__abstractmethods__}
    return type("Toy", (base,), namespace | {"__init__": _init, "__eq__": _eq, "__hash__": None})


def _init(self: Any, tensor: str, strength: float) -> None:
    self.tensor, self.strength = tensor, strength


def _eq(self: Any, other: Any) -> bool:
    return type(self) is type(other) and vars(self) == vars(other)


def _delegated(name: str) -> Any:
    def of(self: Any) -> Any:
        return getattr(nf.ScalarSymmetry(plus=nf.Axis(self.tensor, 0)), name)

    if isinstance(inspect.getattr_static(nf.Symmetry, name), property):
        return property(of)
    return lambda self, *args, **kwargs: of(self)(*args, **kwargs)
