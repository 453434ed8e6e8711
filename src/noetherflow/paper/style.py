"""One look for all figures; line styles tell curves apart, so that they survive a grey printer."""

from typing import Any

from matplotlib.figure import Figure

MEASURED: dict[str, Any] = {"color": "#1f6f8b", "linewidth": 1.0}
PREDICTED: dict[str, Any] = {"color": "black", "linewidth": 1.6, "linestyle": "--"}
CONTRAST: dict[str, Any] = {"color": "#d1603d", "linewidth": 1.0}
FAINT: dict[str, Any] = {"color": "0.75", "linewidth": 0.8}


def panels(count: int, *, width: float = 4.2, height: float = 3.6) -> Figure:
    """An empty figure with room for some panels beside each other."""
    return Figure(figsize=(width * count, height), layout="constrained")
