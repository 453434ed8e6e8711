"""What comes of the noise equilibrium: sharpness, stable steps, warmup."""

from noetherflow.forecasting.forecast import forecast
from noetherflow.forecasting.result import Forecast

__all__ = ["Forecast", "forecast"]
