"""Results of all kinds, to be stored."""

import copy
import dataclasses
import functools
import math
from typing import Any

import torch

import noetherflow as nf
from cases import Case, case

SGD = nf.SGD(0.1, 5, 0.02, replacement=False, dataset_size=1000)


def results_of(one: Case) -> list[Any]:
    """Moments, equilibrium, analysis and second moments of a case."""
    analysis = nf.analyze(one.model, one.loss, one.loader(), SGD, one.symmetries, progress=False)
    return [analysis.noise, analysis.equilibrium, analysis, second_moments(one)]


def second_moments(one: Case) -> nf.SecondMoments:
    """Of a copy of the model, after three steps."""
    model = copy.deepcopy(one.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for batch in one.loader()[:3]:
        optimizer.zero_grad()
        one.loss(model, batch).mean().backward()
        optimizer.step()
    return nf.second_moments(optimizer, model, one.symmetries)


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
