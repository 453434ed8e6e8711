"""Calls of PyTorch functions: their tensors, calls without dropout, and PyTorch's own Python code under a mode."""

import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from noetherflow.noise.capture.kinds import ADDITIONS
from noetherflow.noise.capture.layouts import SHARED, Layout

DROPOUT = {
    functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d, functional.alpha_dropout,
    functional.feature_alpha_dropout, torch.dropout, torch.feature_dropout, torch.alpha_dropout,
}  # fmt: skip
WITH_DROPOUT = {*DROPOUT, functional.scaled_dot_product_attention}
# Properties that are views of a tensor; all others say something about it, or cut it off from its gradient.
_VIEWS = {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")}
_DETACHED = {Tensor.requires_grad_, Tensor.detach}


def unseen() -> AbstractContextManager[Any, Any]:
    """A block inside a backward pass that neither modes nor autograd see."""
    quiet = torch._C.DisableTorchFunction()
    if not torch.is_grad_enabled():
        return quiet  # as in almost every backward pass, where small calls between large products are felt
    both = ExitStack()
    both.enter_context(quiet)
    both.enter_context(torch.no_grad())
    return both


@final
class WithoutDropout(TorchFunctionMode):
    """A mode in which dropout does nothing, so that two passes can be compared."""

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Skip dropout."""
        return without_dropout(func, args, kwargs or {}) if func in WITH_DROPOUT else func(*args, **(kwargs or {}))


def without_dropout(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a function in WITH_DROPOUT, without dropout."""
    if func in DROPOUT:
        return args[0] if args else kwargs["input"]
    if len(args) > 4:
        return func(*args[:4], 0.0, *args[5:], **kwargs)
    return func(*args, **{**kwargs, "dropout_p": 0.0})


def own_code(function: Any) -> Any:
    """A function of PyTorch that would hand itself over to an active mode, as a function that runs its own code."""
    names = {"has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"}
    space = {**function.__globals__, **dict.fromkeys(names, lambda *_: False)}
    copy = types.FunctionType(function.__code__, space, argdefs=function.__defaults__, closure=function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def name_of(func: Any) -> str:
    """The name of a function."""
    return getattr(func, "__name__", str(func))


def is_in_place(func: Any) -> bool:
    """Whether a function writes into its first argument."""
    name = name_of(func)
    return (name.endswith("_") and not name.endswith("__")) or name in _WRITING


_WRITING = {"__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow", "and", "or", "xor"))}


def is_detached(func: Any) -> bool:
    """Whether the result of a function has nothing to do with the gradient of its arguments."""
    if func in _DETACHED:
        return True
    return name_of(func) in ("__get__", "__set__") and func not in _VIEWS


def leaves_of(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from leaves_of(value)
        elif isinstance(value, dict):
            yield from leaves_of(value.values())


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """An argument with a function of every tensor in it."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(mapped(function, part) for part in value)
    if type(value) is dict:
        return {name: mapped(function, part) for name, part in value.items()}
    return value


def as_function(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *given: Tensor) -> Callable[..., Any]:
    """A call as a function of some of the tensors that it was given."""

    def function(*tensors: Tensor) -> Any:
        stand_ins = {id(leaf): tensor for leaf, tensor in zip(given, tensors, strict=True)}

        def put(leaf: Tensor) -> Tensor:
            return stand_ins.get(id(leaf), leaf)

        return func(*mapped(put, args), **mapped(put, kwargs))

    return function


def named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments in the order of a function's signature; None where nothing was given."""
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


@final
@dataclass(frozen=True, eq=False)
class FunctionCall:
    """A call of a PyTorch function, and where the examples are in its arguments.

    Args:
        func: The function.
        args: Its arguments.
        kwargs: Its named arguments.
        given: The tensors among these that depend on the batch, with their layouts, by identity.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: Mapping[int, tuple[Tensor, Layout]]

    @property
    def name(self) -> str:
        """The name of the function."""
        return name_of(self.func)

    @property
    def adds_up(self) -> bool:
        """Whether it adds entries of its arguments up, and multiplies them by nothing."""
        return self.name in ADDITIONS or self.kwargs.get("reduction") == "sum"

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors among its arguments."""
        return list(leaves_of((*self.args, *self.kwargs.values())))

    @property
    def layouts(self) -> list[Layout]:
        """The layouts of those that depend on the batch."""
        return [layout for _, layout in self.given.values()]

    def layout(self, leaf: Tensor) -> Layout:
        """Where the examples are in a tensor among the arguments."""
        entry = self.given.get(id(leaf))
        return SHARED if entry is None else entry[1]

    def results(self, put: Callable[[Tensor], Any]) -> list[Tensor]:
        """What the function returns for a function of every tensor among its arguments."""
        return list(leaves_of((self.func(*mapped(put, self.args), **mapped(put, self.kwargs)),)))

    def with_given(self, given: Mapping[int, tuple[Tensor, Layout]]) -> "FunctionCall":
        """The call with other tensors that depend on the batch."""
        return replace(self, given=given)
