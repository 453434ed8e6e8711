"""What PyTorch's own libraries offer to compiled loops: products of matrices, and threads."""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch

# What a thread does: best a compiled loop and all it is given, for what is Python waits for other threads.
Task = Callable[[], object]
# What a team of threads runs.
_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
# BLAS' letter for a type, and the type in C.
_TYPES: dict[torch.dtype, tuple[str, Any]] = {
    torch.float32: ("s", ctypes.c_float),
    torch.float64: ("d", ctypes.c_double),
}
# Processors for which there are kernels, by PyTorch's name.
_VECTORS = {"AVX2", "AVX512"}
# How many shapes may have them: on every thread 20 kB or so for each part that a product is cut into.
_MOST = 256
_SHAPES: set[tuple[int, ...]] = set()


@cache
def product_of(kind: torch.dtype) -> int:
    """The address of the BLAS product of matrices of a type that PyTorch works with; 0 if it cannot be had."""
    letter, number = _TYPES[kind]
    function = _found(f"{letter}gemm_")
    if function is None:
        return 0
    # Whatever bears that name is tried on a product whose result is known.
    left, right, out = (number * 2)(3.0, 4.0), (number * 2)(5.0, 6.0), (number * 4)()
    matrices = (number(1.0), left, 2, right, 1, number(0.0), out, 2)
    _call(function, b"N", b"N", 2, 2, 1, *matrices)
    return _address(function) if list(out) == [15.0, 20.0, 18.0, 24.0] else 0


def kernel_of(kind: torch.dtype, *shape: int) -> int:
    """The address of a faster product of matrices that a cache holds.

    PyTorch has it for the code that its compiler writes, from oneDNN, which makes one for every shape and keeps it.
    BLAS would copy both matrices first, and on some processors works with half the width of their vectors.

    Args:
        kind: The type.
        shape: Of both matrices, as (n, k, m).

    Returns:
        0 if there is none, or for one shape too many.
    """
    address = _kernel_of(kind)
    if address and shape not in _SHAPES:
        if len(_SHAPES) == _MOST:
            return 0
        _SHAPES.add(shape)
    return address


@cache
def _kernel_of(kind: torch.dtype) -> int:
    # at::native::cpublas::brgemm(n, m, k, three row lengths, whether to add, left, right, out, false)
    function = _found("_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb")
    # Elsewhere it is BLAS' product.
    if kind is not torch.float32 or function is None or torch.backends.cpu.get_cpu_capability() not in _VECTORS:
        return 0
    number = ctypes.c_float
    left, right, out = (number * 2)(3.0, 4.0), (number * 2)(5.0, 6.0), (number * 4)()
    function.restype = None
    sizes = map(ctypes.c_int64, (2, 2, 1, 1, 2, 2))
    function(*sizes, ctypes.c_bool(False), left, right, out, ctypes.c_bool(False))
    return _address(function) if list(out) == [15.0, 18.0, 20.0, 24.0] else 0


def _call(function: Any, *arguments: Any) -> None:
    """A routine in Fortran: everything by reference, and the lengths of both letters at the end."""
    function.restype = None
    numbers = [ctypes.c_int64(one) if isinstance(one, int) else one for one in arguments]
    passed = [ctypes.c_char_p(one) if isinstance(one, bytes) else ctypes.byref(one) for one in numbers]
    function(*passed, *2 * [ctypes.c_size_t(1)])


def team_size() -> int:
    """How many threads PyTorch uses; 1 if compiled loops cannot run on these."""
    return 1 if _found("GOMP_parallel") is None else torch.get_num_threads()


def cut(length: int, parts: int) -> list[slice]:
    """So many parts of a range, as equal as possible."""
    ends = [length * index // parts for index in range(parts + 1)]
    return [slice(first, last) for first, last in pairwise(ends)]


def in_parallel(tasks: Sequence[Task]) -> None:
    """Run tasks on the threads of PyTorch: others would have to share processors with these, which wait by looping.

    Args:
        tasks: Compiled loops that let go of the interpreter.

    Raises:
        BaseException: Whatever a task raised; others may not have run then.
        KeyboardInterrupt: If that came before a task began.
    """
    if len(tasks) == 1:
        tasks[0]()
        return
    waiting, done, raised = iter(list(tasks)), [], []

    def work(_: Any) -> None:
        try:
            for task in waiting:  # every thread takes the next one; there may be more threads, or fewer
                task()
                done.append(task)
        except BaseException as problem:
            raised.append(problem)

    team = _found("GOMP_parallel")
    if team is None:
        work(None)
    else:
        # All threads, as PyTorch asks for them: a pool that shrinks and grows starts its threads anew.
        team(_BODY(work), None, ctypes.c_uint(0), ctypes.c_uint(0))
    if raised:
        raise raised[0]
    if len(done) < len(tasks):
        raise KeyboardInterrupt  # where there was no Python to raise it to


@cache
def _found(name: str) -> Any:
    """A function of PyTorch's libraries, or of those that they are linked with."""
    try:
        return getattr(ctypes.CDLL(torch._C.__file__), name)
    except (AttributeError, OSError):
        return None


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0
