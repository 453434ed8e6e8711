"""Function modes: running a model without dropout, and PyTorch's own Python code under a mode."""

import types
from contextlib import AbstractContextManager, ExitStack
from typing import Any, final

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

DROPOUT = {
    functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d, functional.alpha_dropout,
    functional.feature_alpha_dropout, torch.dropout, torch.feature_dropout, torch.alpha_dropout,
}  # fmt: skip
CALMED = {*DROPOUT, functional.scaled_dot_product_attention}


def aside() -> AbstractContextManager[Any, Any]:
    """A block inside a backward pass that neither modes nor autograd see."""
    quiet = torch._C.DisableTorchFunction()
    if not torch.is_grad_enabled():
        return quiet  # as in nearly every backward pass; the smallest of calls are felt between large products
    both = ExitStack()
    both.enter_context(quiet)
    both.enter_context(torch.no_grad())
    return both


@final
class Calm(TorchFunctionMode):
    """A mode without dropout, so that two passes can be compared."""

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Skip dropout."""
        return calmed(func, args, kwargs or {}) if func in CALMED else func(*args, **(kwargs or {}))


def calmed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call without dropout."""
    if func in DROPOUT:
        return args[0] if args else kwargs["input"]
    if len(args) > 4:
        return func(*args[:4], 0.0, *args[5:], **kwargs)
    return func(*args, **{**kwargs, "dropout_p": 0.0})


def own_code(function: Any) -> Any:
    """A function of PyTorch that would hand itself over to an active mode, as one that runs its own code at once."""
    names = {"has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"}
    space = {**function.__globals__, **dict.fromkeys(names, lambda *_: False)}
    copy = types.FunctionType(function.__code__, space, argdefs=function.__defaults__, closure=function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
