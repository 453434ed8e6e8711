"""Measuring the gradient noise that the symmetries need."""

from noetherflow.noise.estimate import estimate_noise
from noetherflow.noise.meter import NoiseMeter
from noetherflow.noise.microbatch import MicrobatchMeter
from noetherflow.noise.moments import NoiseMoments
from noetherflow.noise.ops.registry import gradient_rule
from noetherflow.noise.step import StepNoise

__all__ = ["MicrobatchMeter", "NoiseMeter", "NoiseMoments", "StepNoise", "estimate_noise", "gradient_rule"]
