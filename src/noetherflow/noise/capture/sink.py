"""Where the gradients of parameters go."""

from enum import Enum, auto
from typing import final


@final
class GradientSink(Enum):
    """Where the sum of the gradients of a parameter goes."""

    PASSED_ON = auto()  # to the parameter, as without a capture
    KEPT = auto()  # to the capture
    DROPPED = auto()  # nowhere; it is not formed where its squares cost less
