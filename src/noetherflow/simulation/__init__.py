"""Simulated training: SGD, gradient descent and their continuous limits, for many replicas at once."""

from noetherflow.simulation.dynamics import GradientDescent, GradientFlow, Langevin
from noetherflow.simulation.noether import NoetherFlow
from noetherflow.simulation.run import simulate
from noetherflow.simulation.trajectory import Trajectory

__all__ = ["GradientDescent", "GradientFlow", "Langevin", "NoetherFlow", "Trajectory", "simulate"]
