"""The table of exponent rules: from the name of an operation to what it demands of the exponents of its inputs."""

from collections.abc import Callable
from typing import Any, TypeVar

from noetherflow._errors import SettingsError
from noetherflow.detect.operation import Operation

Rule = Callable[[Operation], Any]
_R = TypeVar("_R", bound=Rule)
RULES: dict[str, Rule] = {}


def exponent_rule(*keys: str) -> Callable[[_R], _R]:
    """Register a function as the exponent rule of one operation or more.

    A rule gets an `Operation`, whose tensors are `ScalingExponents`, says what the operation demands of them, and
    returns the exponents of the result (a list if there are several results). A rule replaces an earlier rule of that
    key. An operation without a rule is taken apart by PyTorch's own decompositions; what is then still unknown lets
    nothing through.

    Args:
        keys: Names with their namespace and without overload, such as `aten::glu` or `mylib::relu`.

    Returns:
        A decorator that returns the function unchanged.

    Raises:
        SettingsError: If a key has no namespace, or an overload.

    Examples:
        >>> import noetherflow as nf
        >>> @nf.exponent_rule("mylib::clipped_relu")
        ... def clipped_relu(operation: nf.Operation) -> nf.ScalingExponents:
        ...     operation.require_zero(operation.x)  # f(c x) = c f(x) does not hold
        ...     return operation.results()

    Source: this package's own.
    """
    for key in keys:
        if key.count("::") != 1 or not all(key.split("::")) or "." in key:
            raise SettingsError(
                "an exponent rule is registered under the name of an operation with its namespace and without its "
                f"overload, such as 'aten::relu' or 'mylib::relu'; got {key!r}"
            )

    def register(rule: _R) -> _R:
        RULES.update(dict.fromkeys(keys, rule))
        return rule

    return register
