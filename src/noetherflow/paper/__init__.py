"""The experiments of the paper: one file per figure, each with its settings, its run, its picture and its claims."""
