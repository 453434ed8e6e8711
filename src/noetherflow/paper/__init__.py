"""The experiments of the paper: for every figure the settings, the simulation, the plot and the claims."""
