"""A claim: what was predicted, what was measured, and whether it holds."""

from dataclasses import dataclass, field
from typing import Any, final


@final
@dataclass(frozen=True)
class Claim:
    """One sentence with a number to it.

    Args:
        text: What is claimed.
        predicted: What the theory says.
        measured: What came out.
        low: Lower end of the band in which the measured number must lie; None is no bound.
        high: Upper end.
        error: Standard error of the measured number, where it is random.
        wrong: Where the nearest mistakes would land, by what they are.
    """

    text: str
    predicted: float
    measured: float
    low: float | None = None
    high: float | None = None
    error: float | None = None
    wrong: dict[str, float] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether the measured number lies in the band; never for NaN."""
        return self.admits(self.measured)

    def admits(self, value: float) -> bool:
        """Whether a number lies in the band."""
        above = self.low is None or value >= self.low
        below = self.high is None or value <= self.high
        return value == value and above and below

    @property
    def band(self) -> str:
        """The band as people write it."""
        if self.low is None:
            return f"<= {self.high:.3g}"
        if self.high is None:
            return f">= {self.low:.3g}"
        return f"[{self.low:.3g}, {self.high:.3g}]"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, with the verdict."""
        names = ("text", "predicted", "measured", "error", "low", "high", "wrong")
        return {name: getattr(self, name) for name in names} | {"holds": self.holds}
