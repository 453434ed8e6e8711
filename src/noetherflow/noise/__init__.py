"""Measuring the gradient noise that the symmetries need."""

from noetherflow.noise.estimate import estimate_noise
from noetherflow.noise.moments import NoiseMoments

__all__ = ["NoiseMoments", "estimate_noise"]
