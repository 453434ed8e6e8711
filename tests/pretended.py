"""A device that computes on the CPU and refuses what CUDA refuses: mistakes of devices are visible without a GPU.

`FakeTensorMode` has no numbers, and in a build of PyTorch without CUDA its first backward pass of a tensor on "cuda"
ends the process, because no device guard is registered for CUDA. Here the device type that PyTorch leaves free for
backends in Python is used instead, under the name `pretended`. A tensor on it holds a tensor of the CPU, and every
operation of PyTorch, also below autograd and `torch.func`, passes through `__torch_dispatch__`, which

- refuses tensors of two devices, except numbers of the CPU (shape ()) in entrywise operations, and indices,
- refuses a generator of the CPU, operations and drivers that CUDA does not have, and `numpy`,
- gives results the device of the arguments, and factories with `device=` the device that they name,
- draws random numbers from a state of the device, so that a device whose state is not restored is noticed.

What it cannot do: the fused cells of LSTM and GRU, which the CPU does not have; autocast; and `torch.export` of a loss
with a tensor in its closure, which the exporter takes for a tensor of the CPU.

There are the devices `pretended:0`, `pretended:1`, and `pretended:7`, which has no float64, like MPS. Importing this
file registers the device in the process.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import proxy_tensor
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretended"
WITHOUT_FLOAT64 = torch.device("cpu")  # replaced below, once the name is registered
# Operations that CUDA does not have, or has for the CPU only in part.
_MISSING = {"aten::histogram", "aten::histogramdd", "aten::_histogramdd_from_bin_cts", "aten::_nested_tensor_from_mask"}
# Arguments that may lie on the CPU beside a tensor of CUDA: indices, and what is copied.
_MAY_MIX = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::_copy_from", "aten::set_"}
_INDEXED = {"aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index_put"}
_TAKES_NUMBERS = {"aten::fill", "aten::fill_", "aten::masked_fill", "aten::masked_fill_", "aten::where"}


class PretendedTensor(Tensor):
    """A tensor on a pretended device; `inner` holds its numbers on the CPU."""

    inner: Tensor
    # No override of functions: what PyTorch's functions are made of is seen below.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> "PretendedTensor":
        if device.index is None:
            device = torch.device(device.type, 0)
        if device == WITHOUT_FLOAT64 and inner.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"cannot convert a tensor to {device}: the device has no float64")
        made: PretendedTensor = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        """As for any tensor."""
        return self.detach()

    @data.setter
    def data(self, value: "PretendedTensor") -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner

    def untyped_storage(self) -> torch.UntypedStorage:
        """The memory, by which views are recognised."""
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        """The address of the first number."""
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        """The numbers."""
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refused, as by CUDA."""
        if force:
            return self.inner.numpy(force=True)
        _refuse(TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first"))

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.inner!r} on {self.device}"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(self.inner, spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) in memo:
            known: Tensor = memo[id(self)]
            return known
        copied: Tensor = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=self.requires_grad)
        memo[id(self)] = copied
        return copied


def _refuse(error: Exception) -> None:
    """Keep a mistake and raise it; in a backward pass, where an exception of Python ends the process, only keep it."""
    _MISTAKES.append(error)
    if torch._C._current_graph_task_id() == -1:
        raise error


@contextmanager
def pretending() -> Iterator[list[Exception]]:
    """A block for computations on pretended devices, which raises the first mistake at its end even if it was caught.

    Backward passes run in the thread that calls them, because the devices have no threads.

    Yields:
        The mistakes so far; who expects mistakes clears the list.
    """
    _MISTAKES.clear()
    with torch.autograd.set_multithreading_enabled(False):
        yield _MISTAKES
    if _MISTAKES:
        raise AssertionError(f"{len(_MISTAKES)} mistakes, the first: {_MISTAKES[0]}") from _MISTAKES[0]


def _run(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """An operation on the numbers, after the checks; its tensors on the device of the arguments, or on that named."""
    name = func._schema.name
    tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    device = _device_of(name, func, args, tensors)
    _require_possible(name, func, args, kwargs, device)
    target = kwargs.get("device") or device
    kept = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, PretendedTensor)}

    def inside(value: Any) -> Any:
        return value.inner if isinstance(value, PretendedTensor) else value

    def outside(value: Any) -> Any:
        if not isinstance(value, Tensor) or target.type != NAME:
            return value
        if id(value) not in kept:
            return PretendedTensor(value, target)
        # An operation in place returns its argument.
        argument = kept[id(value)]
        assert argument.shape == value.shape, f"{name} has changed the shape of its argument"
        return argument

    changed = {key: None if key == "device" else value for key, value in kwargs.items()}
    if target.type != NAME and "device" in changed:
        changed["device"] = target
    if name == "aten::linalg_lstsq" and kwargs.get("driver") is None:
        changed["driver"] = "gels"
    with _STATES.of(device) if torch.Tag.nondeterministic_seeded in func.tags else nullcontext():
        given, named = tree_map(inside, args), tree_map(inside, changed)
        if name == "aten::histc" and not given[0].is_floating_point():
            result = func(given[0].double(), *given[1:], **named).to(given[0].dtype)  # the CPU counts no integers
        else:
            result = func(*given, **named)
    if torch.Tag.inplace_view in func.tags:
        with no_dispatch():
            func(*args, **kwargs)  # the shape that PyTorch knows of the argument changes, too
    return tree_map(outside, result)


def _device_of(name: str, func: Any, args: Any, tensors: list[Tensor]) -> torch.device:
    """The device on which an operation runs; an error of the kind that CUDA raises if the tensors are on several."""
    away = [tensor.device for tensor in tensors if tensor.device.type == NAME]
    if name in _MAY_MIX:
        devices = {args[0].device} if name in ("aten::index", "aten::copy_") else set(away)
        if name == "aten::index" and args[0].device.type != NAME:
            _refuse(RuntimeError(f"indices should be on the CPU like the indexed tensor, found {away[0]}"))
        return next(iter(devices))
    if name in _INDEXED:
        tensors = [args[0], args[2]]
    numbers_mix = torch.Tag.pointwise in func.tags or name in _INDEXED | _TAKES_NUMBERS
    here = {tensor.device for tensor in tensors if tensor.device.type == NAME}
    others = {tensor.device for tensor in tensors if tensor.device.type != NAME and (tensor.ndim or not numbers_mix)}
    if len(here | others) > 1:
        found = ", ".join(sorted(str(device) for device in here | others))
        _refuse(RuntimeError(f"Expected all tensors to be on the same device, but found {found}, in {name}"))
    return away[0]


def _require_possible(name: str, func: Any, args: Any, kwargs: Mapping[str, Any], device: torch.device) -> None:
    """Raise for what CUDA does not have."""
    if name in _MISSING:
        _refuse(NotImplementedError(f"{name} is not implemented for {device}"))
    _require_own_generator(name, (args, dict(kwargs)), device)
    if name == "aten::linalg_lstsq":
        driver = kwargs.get("driver", args[3] if len(args) > 3 else None)
        if driver not in (None, "gels"):
            _refuse(RuntimeError(f"parameter `driver` should be one of (gels) for {device}, got {driver!r}"))


def _require_own_generator(name: str, given: Any, device: torch.device) -> None:
    """Raise for a generator of the CPU."""
    if any(isinstance(leaf, torch.Generator) and leaf.device.type != NAME for leaf in tree_leaves(given)):
        _refuse(RuntimeError(f"Expected a {device.type!r} device type for generator but found 'cpu', in {name}"))


def placed(model: nn.Module, device_of: Callable[[str], torch.device]) -> nn.Module:
    """A copy of a model with every parameter and buffer on the device of its name; shared tensors stay shared.

    `Module.to` makes a new parameter for every use of a tensor of another class, which would untie weights.
    """
    memo: dict[int, Tensor] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        moved = tensor.detach().clone().to(device_of(name))
        memo[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
    return copy.deepcopy(model, memo)


class _States:
    """The states of the random generators of the devices."""

    def __init__(self) -> None:
        self._states = {index: torch.Generator().manual_seed(0).get_state() for index in (0, 1, 7)}

    @contextmanager
    def of(self, device: torch.device) -> Iterator[None]:
        """A block in which the global generator is that of a device."""
        before = torch.get_rng_state()
        torch.set_rng_state(self._states[device.index or 0])
        try:
            yield
        finally:
            self._states[device.index or 0] = torch.get_rng_state()
            torch.set_rng_state(before)

    # What PyTorch expects of the module of a device.

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return False  # nobody should choose this device by himself

    _initialized = True

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def device(self, device: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 2

    def manual_seed_all(self, seed: int) -> None:
        for index in self._states:
            self._states[index] = torch.Generator().manual_seed(seed).get_state()

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return self._states[torch.device(device).index or 0 if not isinstance(device, int) else device]

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
        self._states[torch.device(device).index or 0 if not isinstance(device, int) else device] = state


def _factory(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A factory of the CPU for tensors of a pretended device."""

    def made(*args: Any, device: Any = None, layout: Any = None, pin_memory: Any = None, **more: Any) -> Tensor:
        _require_own_generator(str(make), (args, more), device)
        return PretendedTensor(make(*args, device="cpu", **more), device)

    return made


def _copy_from(source: Tensor, target: PretendedTensor, non_blocking: bool = False) -> Tensor:
    target.inner.copy_(source)
    return target


_STATES = _States()
_MISTAKES: list[Exception] = []
backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_STATES)
WITHOUT_FLOAT64 = torch.device(NAME, 7)
_LIBRARY = torch.library.Library("aten", "IMPL")
for _operation in (
    "empty.memory_format empty_strided tril_indices triu_indices arange.start_step eye eye.m linspace",
    "arange arange.start linspace.Tensor_Tensor logspace randperm randperm.generator full",
):
    for _name in _operation.split():
        _packet, _, _overload = _name.partition(".")
        _make = getattr(getattr(torch.ops.aten, _packet), _overload or "default")
        _LIBRARY.impl(_name, _factory(_make), "PrivateUse1")
_LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")
# A graph that `make_fx` records may hold such tensors as constants.
proxy_tensor.HANDLED_TYPES = (*proxy_tensor.HANDLED_TYPES, PretendedTensor)
