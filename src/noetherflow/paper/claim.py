"""A claim: the predicted value, the measured value, the band of accepted values, and the verdict."""

from dataclasses import dataclass, field
from typing import Any, final


@final
@dataclass(frozen=True)
class Claim:
    """A statement about a number: it holds if the measured value lies in the band [low, high].

    Args:
        text: The statement.
        predicted: The value that the theory gives.
        measured: The value of the simulation.
        low: Lower end of the band; None for a band without a lower end.
        high: Upper end of the band; None for a band without an upper end.
        error: Standard error of the measured value; None if the value is deterministic.
        wrong: For each likely mistake, by its description, the value that the mistake would give. The band must
            exclude every such value.
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
        """True if the measured value lies in the band; False for NaN."""
        return self.admits(self.measured)

    def admits(self, value: float) -> bool:
        """True if a value lies in the band; False for NaN."""
        above = self.low is None or value >= self.low
        below = self.high is None or value <= self.high
        return value == value and above and below

    @property
    def band(self) -> str:
        """The band as text, with three significant digits: `[low, high]`, `<= high` or `>= low`."""
        if self.low is None:
            return f"<= {self.high:.3g}"
        if self.high is None:
            return f">= {self.low:.3g}"
        return f"[{self.low:.3g}, {self.high:.3g}]"

    def to_json(self) -> dict[str, Any]:
        """The fields and the verdict `holds`, in plain JSON types."""
        names = ("text", "predicted", "measured", "error", "low", "high", "wrong")
        return {name: getattr(self, name) for name in names} | {"holds": self.holds}
