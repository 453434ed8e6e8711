"""Gradient noise on a GPU: models, methods, and how they are measured."""
