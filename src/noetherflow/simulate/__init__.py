"""Watching the charges move: SGD, gradient descent, their continuous limits, many replicas at once."""

from noetherflow.simulate.dynamics import GradientDescent, GradientFlow, Langevin
from noetherflow.simulate.noether import NoetherFlow
from noetherflow.simulate.run import simulate
from noetherflow.simulate.trajectory import Trajectory

__all__ = ["GradientDescent", "GradientFlow", "Langevin", "NoetherFlow", "Trajectory", "simulate"]
