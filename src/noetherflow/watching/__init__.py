"""Watching the gradient noise of a training run."""

from noetherflow.watching.estimate import ScaleEstimate
from noetherflow.watching.noise_scale import NoiseScale

__all__ = ["NoiseScale", "ScaleEstimate"]
