"""Where the Noether flow ends."""

from noetherflow.equilibrium.equilibrate import equilibrate
from noetherflow.equilibrium.result import Equilibrium, Outcome, Status
from noetherflow.equilibrium.solve import potential, solve_equilibrium

__all__ = ["Equilibrium", "Outcome", "Status", "equilibrate", "potential", "solve_equilibrium"]
