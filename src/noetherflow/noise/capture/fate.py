"""What becomes of the gradients of parameters."""

from enum import Enum, auto
from typing import final


@final
class Fate(Enum):
    """What becomes of the sum of gradients of a parameter."""

    PASSED_ON = auto()  # to the parameter, as ever
    KEPT = auto()  # in the capture
    DROPPED = auto()  # or never formed, if its squares can be had for less
