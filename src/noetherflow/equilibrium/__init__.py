"""Where the Noether flow ends."""

from noetherflow.equilibrium.equilibrate import equilibrate
from noetherflow.equilibrium.result import Equilibrium, Imbalance, Outcome, Status
from noetherflow.equilibrium.solve import potential, solve_equilibrium

__all__ = ["Equilibrium", "Imbalance", "Outcome", "Status", "equilibrate", "potential", "solve_equilibrium"]
