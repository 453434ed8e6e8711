"""Results of all kinds, to be stored."""

import dataclasses
import functools
import math
from typing import Any

import noetherflow as nf
from cases import Case, case

SGD = nf.SGD(0.1, 5, 0.02, replacement=False, dataset_size=1000)


def results_of(one: Case) -> list[Any]:
    """Moments, equilibrium and analysis of a case."""
    analysis = nf.analyze(one.model, one.loss, one.loader(), SGD, one.symmetries, progress=False)
    return [analysis.noise, analysis.equilibrium, analysis]


@functools.cache
def explanation() -> nf.Explanation:
    """With symmetries that were found and, made up, a symmetry that was rejected."""
    one = case("convolution, flatten, linear")
    explained = nf.explain(one.model, one.loss, one.batch)
    rejected = dataclasses.replace(explained.found[0], residual=nf.Residual(0.5, math.inf, 7), small="norm adds 1e-5")
    return dataclasses.replace(explained, rejected=(rejected,))


@functools.cache
def noise() -> nf.NoiseMoments:
    one = case("diagonal")
    return nf.estimate_noise(one.model, one.loss, one.loader(), one.symmetries, progress=False)
