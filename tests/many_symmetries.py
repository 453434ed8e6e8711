"""Analyses with reports that a test writes, of any number of symmetries."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

import noetherflow as nf
from noetherflow.equilibrium.result import Imbalance

NAN = math.nan


@functools.cache
def small() -> nf.Analysis:
    """A real analysis, whose parts a test replaces."""
    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    batches = [(torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(4)]
    settings = nf.SGD(lr=0.1, batch_size=8, weight_decay=1e-3)
    return nf.analyze(net, lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1), batches, settings)


def report(name: str, **values: Any) -> nf.SymmetryReport:
    """A report that is far from rest, with certain values replaced."""
    usual = {"distance": 0.5, "error": 0.1, "at_rest": False, "status": "converged", "message": ""}
    usual |= {"relaxation_steps": 3000.0, "slowest_steps": 9000.0, "imbalance_before": 0.4, "imbalance_after": 1e-9}
    usual |= {"holdout_before": NAN, "holdout_after": NAN, "kind": "diagonal", "dimension": 3}
    return dataclasses.replace(small().reports[0], name=name, **(usual | values))


def analysis_of(
    reports: Sequence[nf.SymmetryReport], modules: Sequence[str], *, held: bool = False, **changes: Any
) -> nf.Analysis:
    """An analysis of certain reports.

    Args:
        reports: The reports.
        modules: For each report, the module of its two parameters.
        held: Whether data was held out.
        changes: Values of the equilibrium.
    """
    symmetries = {
        one.name: nf.DiagonalSymmetry(nf.Axis(f"{module}.a.weight", 0), nf.Axis(f"{module}.b.weight", 1))
        for one, module in zip(reports, modules, strict=True)
    }
    holdout = {one.name: Imbalance(one.holdout_before, one.holdout_after) for one in reports} if held else {}
    equilibrium = dataclasses.replace(small().equilibrium, symmetries=symmetries, holdout=holdout, **changes)
    return dataclasses.replace(small(), reports=tuple(reports), equilibrium=equilibrium)
