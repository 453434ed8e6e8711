"""Where the Noether flow ends."""

from noetherflow.equilibrium.result import Equilibrium, Outcome, Status
from noetherflow.equilibrium.solve import potential, solve_equilibrium

__all__ = ["Equilibrium", "Outcome", "Status", "potential", "solve_equilibrium"]
