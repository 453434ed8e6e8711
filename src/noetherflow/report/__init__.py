"""Answers to look at: tables, figures, files."""

from noetherflow.report.analysis import Analysis, SymmetryReport, analyze

__all__ = ["Analysis", "SymmetryReport", "analyze"]
