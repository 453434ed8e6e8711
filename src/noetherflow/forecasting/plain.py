"""The parts of a result as JSON types, under their names."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from torch import Tensor

from noetherflow.optimizers import Optimizer


def plain(value: object) -> Any:
    """A result as JSON types; NaN and infinities stay.

    Args:
        value: A result: a dataclass or a named tuple becomes an object with a key for each field, a tensor nested
            lists, a member of an enumeration its name in lower case, the settings of an optimizer what they list.

    Returns:
        JSON types.
    """
    if isinstance(value, Enum):
        return value.name.lower()
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Optimizer):
        return value.listed
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value
