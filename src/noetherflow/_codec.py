"""Values as JSON with references to tensors, and back, by their type annotations.

A value is described by the annotation of the field that holds the value. So a file names no code: its JSON holds
numbers, text and references, and every class comes from an annotation. The exception is an abstract class: its subclass
is looked up by name among the imported subclasses. A tree that does not fit its annotation raises `Misfit`.

| annotation | JSON |
|---|---|
| `None`, `bool`, `int`, `str` | itself |
| `float` | a number, exact to the last bit; for NaN and infinities the bits, as 16 hexadecimal digits |
| `Tensor` | the key of the tensor |
| `tuple[X, ...]`, `tuple[X, Y]`, `list[X]` | an array |
| `dict[str, X]` | an object, in order |
| an `Enum`, a `torch.dtype` | the name of the member or of the dtype |
| another class | an object: the arguments of the constructor by name, each read from the attribute of that name |
| an abstract class | the name of the subclass, and the object |
"""

import collections.abc
import contextlib
import dataclasses
import functools
import inspect
import math
import struct
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum
from typing import Any, final

import torch
from torch import Tensor

from noetherflow._errors import NoetherflowError

Put = Callable[[str, Tensor], str]
"""A function (place, tensor) -> key that stores a tensor; the place is a path such as `NoiseMoments.mean['w']`."""

Take = Callable[[str], Tensor | None]
"""A function key -> tensor, or None if no tensor has that key."""

_OURS = __name__.partition(".")[0]


class Misfit(NoetherflowError):
    """A value, or a tree from a file, does not fit its annotation."""


class Codec(ABC):
    """Converts the values of an annotation to trees of JSON and back."""

    @abstractmethod
    def encode(self, value: Any, where: str, put: Put) -> Any:
        """The tree of a value; `Misfit` names its place `where`."""

    @abstractmethod
    def decode(self, tree: Any, where: str, take: Take) -> Any:
        """The value of a tree; `Misfit` names its place `where`."""


def codec_of(hint: Any) -> Codec:
    """The codec of an annotation; raises `Misfit` if a file cannot hold its values."""
    arguments, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType) and len(arguments) == 2:
        first, other = sorted(map(codec_of, arguments), key=lambda codec: not isinstance(codec, (_Plain, _Float)))
        # No tree fits both: a list is no object.
        if isinstance(first, (_Plain, _Float)) or (isinstance(first, _Sequence) and isinstance(other, _Dictionary)):
            return _Union(first, other)
    if origin in (dict, collections.abc.Mapping) and arguments[:1] == (str,):
        return _Dictionary(codec_of(arguments[1]))
    if origin in (list, tuple, collections.abc.Sequence) and arguments:
        kind = list if origin is list else tuple
        fixed = origin is tuple and arguments[-1] is not ...
        return _Sequence(kind, tuple(codec_of(hint) for hint in (arguments if fixed else arguments[:1])), fixed)
    if hint in (type(None), bool, int, str):
        return _Plain(hint)
    if hint in (float, Tensor):
        return _Float() if hint is float else _Tensor()
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _Named(hint, dict(hint.__members__))
    if hint is torch.dtype:
        return _Named(hint, {str(kind): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)})
    if isinstance(hint, type) and hint.__module__ not in ("builtins", "typing") and origin is None:
        return _Abstract(hint) if inspect.isabstract(hint) else _Class(hint)
    raise Misfit(f"no file can hold a value of the type {getattr(hint, '__name__', hint)}")


@final
@dataclasses.dataclass(frozen=True)
class _Plain(Codec):
    kind: type

    def encode(self, value: Any, where: str, put: Put) -> Any:
        # Integers of numpy become int. A bool is an int in Python, but does not fit the annotation int.
        if self.kind is int and hasattr(value, "__index__") and not isinstance(value, (bool, Tensor)):
            value = int(value)
        return self._checked(value, where)

    def decode(self, tree: Any, where: str, take: Take) -> Any:
        return self._checked(tree, where)

    def _checked(self, value: Any, where: str) -> Any:
        _require(type(value) is self.kind, f"a value of the type {self.kind.__name__}", value, where)
        return value


@final
class _Float(Codec):
    def encode(self, value: Any, where: str, put: Put) -> Any:
        if type(value) is int:  # fits the annotation float, as in Python, and stays an integer
            return value
        _require(isinstance(value, float), "a number", value, where)
        return float(value) if math.isfinite(value) else struct.pack(">d", value).hex()

    def decode(self, tree: Any, where: str, take: Take) -> Any:
        if type(tree) is int or (type(tree) is float and math.isfinite(tree)):
            return tree
        bits = isinstance(tree, str) and len(tree) == 16 and set(tree) <= set("0123456789abcdef")
        value: float = struct.unpack(">d", bytes.fromhex(tree))[0] if bits else 0.0
        _require(not math.isfinite(value), "a number", tree, where)
        return value


@final
class _Tensor(Codec):
    def encode(self, value: Any, where: str, put: Put) -> Any:
        _require(isinstance(value, Tensor), "a tensor", value, where)
        return put(where, value)

    def decode(self, tree: Any, where: str, take: Take) -> Any:
        _require(isinstance(tree, str), "the key of a tensor", tree, where)
        if (tensor := take(tree)) is None:
            raise Misfit(f"{where} refers to a tensor {shown(tree)}, which is not there or belongs to another place")
        return tensor


@final
@dataclasses.dataclass(frozen=True)
class _Union(Codec):
    first: Codec  # tried first
    other: Codec

    def encode(self, value: Any, where: str, put: Put) -> Any:
        with contextlib.suppress(Misfit):
            return self.first.encode(value, where, put)
        return self.other.encode(value, where, put)

    def decode(self, tree: Any, where: str, take: Take) -> Any:
        with contextlib.suppress(Misfit):
            return self.first.decode(tree, where, take)
        return self.other.decode(tree, where, take)


@final
@dataclasses.dataclass(frozen=True)
class _Dictionary(Codec):
    inner: Codec

    def encode(self, value: Any, where: str, put: Put) -> Any:
        fits = isinstance(value, collections.abc.Mapping) and all(type(key) is str for key in value)
        _require(fits, "a mapping from names", value, where)
        return {key: self.inner.encode(entry, f"{where}[{key!r}]", put) for key, entry in value.items()}

    def decode(self, tree: Any, where: str, take: Take) -> Any:
        _require(isinstance(tree, dict), "an object", tree, where)
        return {key: self.inner.decode(entry, f"{where}[{key!r}]", take) for key, entry in tree.items()}


@final
@dataclasses.dataclass(frozen=True)
class _Sequence(Codec):
    """A list or tuple: of fixed length with a codec per entry, or of any length with one codec for all entries."""

    kind: type
    inner: tuple[Codec, ...]
    fixed: bool

    def encode(self, value: Any, where: str, put: Put) -> Any:
        return [codec.encode(entry, place, put) for codec, entry, place in self._entries(value, where)]

    def decode(self, tree: Any, where: str, take: Take) -> Any:
        return self.kind(codec.decode(entry, place, take) for codec, entry, place in self._entries(tree, where))

    def _entries(self, given: Any, where: str) -> list[tuple[Codec, Any, str]]:
        fits = isinstance(given, (list, tuple)) and (not self.fixed or len(given) == len(self.inner))
        _require(fits, f"a sequence{f' of length {len(self.inner)}' * self.fixed}", given, where)
        codecs = self.inner if self.fixed else self.inner * len(given)
        return [(codec, entry, f"{where}[{k}]") for k, (codec, entry) in enumerate(zip(codecs, given, strict=True))]


@final
@dataclasses.dataclass(frozen=True)
class _Named(Codec):
    kind: type
    members: dict[str, Any]

    def encode(self, value: Any, where: str, put: Put) -> Any:
        _require(isinstance(value, self.kind), f"a member of {self.kind.__name__}", value, where)
        return next(name for name, member in self.members.items() if member is value)

    def decode(self, tree: Any, where: str, take: Take) -> Any:
        _require(isinstance(tree, str) and tree in self.members, f"one of {', '.join(self.members)}", tree, where)
        return self.members[tree]


@final
@dataclasses.dataclass(frozen=True)
class _Class(Codec):
    """A dataclass, a NamedTuple, or a class whose constructor's arguments are attributes of the same names."""

    kind: Any

    def encode(self, value: Any, where: str, put: Put) -> Any:
        parameters, tree = _parameters(self.kind), {}
        _require(type(value) is self.kind, f"a value of the type {self.kind.__name__}", value, where)
        for name, codec in parameters.items():
            if not hasattr(value, name):
                raise Misfit(f"{where} has no attribute {name!r}, which has to hold that argument of its constructor")
            tree[name] = codec.encode(getattr(value, name), f"{where}.{name}", put)
        return tree

    def decode(self, tree: Any, where: str, take: Take) -> Any:
        parameters = _parameters(self.kind)
        fits = isinstance(tree, dict) and tree.keys() == parameters.keys()
        _require(fits, f"an object with the entries {', '.join(parameters)}", tree, where)
        arguments = {name: codec.decode(tree[name], f"{where}.{name}", take) for name, codec in parameters.items()}
        try:
            return self.kind(**arguments)
        except Exception as error:  # the constructor of a user's class may raise any exception
            raise Misfit(f"{where} is not a {self.kind.__name__}: {error}") from error


@final
@dataclasses.dataclass(frozen=True)
class _Abstract(Codec):
    """An object of any imported subclass of an abstract class."""

    kind: Any

    def encode(self, value: Any, where: str, put: Put) -> Any:
        _require(isinstance(value, self.kind), f"a {self.kind.__name__}", value, where)
        kind: Any = type(value)
        arguments = codec_of(kind).encode(value, where, put)
        return {"class": kind.__qualname__, "package": _package(kind), "arguments": arguments}

    def decode(self, tree: Any, where: str, take: Take) -> Any:
        fits = isinstance(tree, dict) and tree.keys() == {"class", "package", "arguments"}
        _require(fits, "an object with the entries class, package, arguments", tree, where)
        return codec_of(self._find(tree["class"], tree["package"], where)).decode(tree["arguments"], where, take)

    def _find(self, name: Any, package: Any, where: str) -> Any:
        named = [kind for kind in _subclasses(self.kind) if kind.__qualname__ == name]
        exact = [kind for kind in named if _package(kind) == package]
        # The package of a class in a script is __main__ if the script runs, and its file name if it is imported.
        script = [kind for kind in named if "__main__" in (_package(kind), package) and _package(kind) != _OURS]
        if exact or len(script) == 1:
            return (exact or script)[-1]  # the last definition, if a notebook defines a class repeatedly
        remedy = f"import the module of {shown(package)} that defines the class"
        raise Misfit(f"{where} is of the class {shown(name)}, which is not an imported {self.kind.__name__}: {remedy}")


@functools.cache
def _parameters(kind: Any) -> dict[str, Codec]:
    """The codecs of the arguments of a constructor, by name."""
    fields = dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")
    described = kind if fields else kind.__new__ if kind.__init__ is object.__init__ else kind.__init__
    try:
        hints = typing.get_type_hints(described)
        return {name: codec_of(hints[name]) for name in inspect.signature(kind).parameters}
    except (NameError, KeyError, TypeError, ValueError, Misfit) as error:
        remedy = "every argument of its constructor needs an annotation that a file can hold"
        raise Misfit(f"a {kind.__name__} cannot be written: {remedy} ({error})") from error


def _subclasses(kind: type) -> list[type]:
    """All imported subclasses that are not abstract, in order of definition."""
    direct: list[type] = kind.__subclasses__()
    below = [further for each in direct for further in (each, *_subclasses(each))]
    return [each for each in dict.fromkeys(below) if not inspect.isabstract(each)]


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _require(fits: bool, what: str, given: Any, where: str) -> None:
    if not fits:
        raise Misfit(f"{where}: expected {what}, got {shown(given)}")


def shown(value: Any) -> str:
    """A short text for a value in an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of length {len(value)}"
    text = f"entries {', '.join(map(str, value)) or 'none'}" if isinstance(value, dict) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
