"""The experiments of the paper: for every figure the settings, the simulation, the plot and the claims."""

from noetherflow._extras import require

# Every file of this folder draws.
require("paper", "matplotlib", "rich", purpose="the paper's experiments")
