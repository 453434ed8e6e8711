"""Adapters to trainers, a file for each: they measure nothing themselves and need the trainer to be installed."""
