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


def layers() -> nf.Analysis:
    """Five symmetries in two blocks and across blocks: far, at rest, error unknown, at infinity, and no distance."""
    reports = (
        report("first", distance=math.log(1.8), error=0.05, dimension=12, imbalance_before=0.9),
        report("second", distance=0.1, error=0.2, at_rest=True, relaxation_steps=500.0, kind="matrix"),
        report("third", distance=0.3, error=NAN, relaxation_steps=math.inf, slowest_steps=math.inf),
        report("fourth", distance=0.2, error=0.0123, status="at_infinity", message="row 3 has no pull"),
        report("fifth", distance=0.0, error=NAN, status="singular", imbalance_before=NAN, imbalance_after=NAN),
    )
    modules = ("net.h.0.mlp", "net.h.0.attn.c", "net.h.1.mlp", "net.h.1", "head")
    notes = ("the pooler <b>is not used</b> by the loss",)
    return analysis_of(reports, modules, notes=notes, trace_before=3.18, trace_after=4.48, passes=7)


def many(count: int = 10_000) -> nf.Analysis:
    """Symmetries of 100 blocks with distances that are a permutation of 0 to 1."""
    reports = [
        report(f"layer {k}", distance=(k * 7919 % count) / count, at_rest=k % 2 == 0, message="m" * (k % 3))
        for k in range(count)
    ]
    return analysis_of(reports, [f"model.layers.{k * 100 // count}" for k in range(count)])
