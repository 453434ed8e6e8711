"""What holds of every model at its equilibrium, measured afresh there, and a table of the models of the sweeps.

`python tests/resting.py` prints the table for the zoo and the models of Hugging Face, without and with weight decay;
words after it choose the models whose names contain one of these words.
"""

import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import hugging_face
import noetherflow as nf
import zoo
from hugging_face import Subject
from noetherflow._batch import cast
from noetherflow._model_function import ModelFunction
from noetherflow._params import copy_of

DECAYS = (0.0, 1e-3)
TOLERANCE = 1e-6
# What rounding may leave of the loss of an example and of the sum of both forces, by the type of the computation.
UNCHANGED = {torch.float64: 1e-11, torch.float32: 1e-5}
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}
ENDINGS = {nf.Status.CONVERGED, nf.Status.SINGULAR, nf.Status.AT_INFINITY, nf.Status.DEGENERATE}
CPU = torch.device("cpu")


def settings(decay: float) -> nf.SGD:
    return nf.SGD(lr=0.1, batch_size=8, weight_decay=decay)


def dtype_of(equilibrium: nf.Equilibrium) -> torch.dtype:
    """The type in which the noise was measured."""
    return torch.float32 if any("computed in torch.float32" in note for note in equilibrium.notes) else torch.float64


def at(model: nn.Module, params: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """A copy of a model with other parameters."""
    copied = copy_of(model, dtype)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            parameter.copy_(params[name])
    return copied


def function_is_unchanged(model: nn.Module, loss: nf.Loss, batches: Sequence[Any], equilibrium: nf.Equilibrium) -> None:
    """The loss of every example is that of the model, relative to that loss or to the mean of all."""
    dtype = dtype_of(equilibrium)
    before = {name: parameter.detach() for name, parameter in model.named_parameters()}
    here, there = (at(model, params, dtype) for params in (before, equilibrium.params))
    with torch.no_grad():
        for batch in cast(list(batches), dtype, CPU):
            first, second = loss(here, batch), loss(there, batch)
            size = first.abs().clamp_min(first.abs().mean())
            # Some transformers compute in float32 whatever the type of their parameters and of their losses.
            precision = ModelFunction(here, loss, dtype).observe(batch).precision
            assert ((second - first).abs() / size).max() <= UNCHANGED.get(precision, UNCHANGED[torch.float32])


def forces_balance(
    model: nn.Module, loss: nf.Loss, batches: Sequence[Any], equilibrium: nf.Equilibrium, sgd: nf.SGD
) -> None:
    """Every coordinate that is called converged has lost its drift, by a fresh measurement at the equilibrium."""
    dtype = dtype_of(equilibrium)
    before = {name: parameter.detach() for name, parameter in model.named_parameters()}
    data, rates = cast(list(batches), dtype, CPU), []
    for params in (before, equilibrium.params):
        place = at(model, params, dtype)
        noise = nf.estimate_noise(place, loss, data, equilibrium.symmetries, progress=False)
        rates.append(nf.drift(noise, sgd, place))
    start, end = rates
    for name, symmetry in equilibrium.symmetries.items():
        outcome = equilibrium.outcomes[name]
        assert outcome.status in ENDINGS, (name, outcome)
        squares = zip(noise.grams[name], symmetry.grams(equilibrium.params), strict=True)
        forces = sum(2 * sgd.temperature * gram.abs() + 4 * sgd.gamma * square for gram, square in squares)
        assert isinstance(forces, Tensor)
        if outcome.status is nf.Status.DEGENERATE:
            continue  # a side is zero, and the symmetry is left where it is
        then, now = start[name].abs(), end[name].abs()
        if isinstance(symmetry, nf.MatrixSymmetry):
            if outcome.status is not nf.Status.CONVERGED:
                continue  # the directions that were left are not known by row
            then, now, forces = then.norm(), now.norm(), forces.norm()
        limit = torch.maximum(TOLERANCE * then, ROUNDING[dtype] * forces).reshape(-1)
        rests = now.reshape(-1) <= limit
        rests[list(outcome.directions)] = True
        assert rests.all(), (name, (now.reshape(-1) / limit).max())


def _row(name: str, model: nn.Module, loss: nf.Loss, batches: Sequence[Any], decay: float) -> str:
    """A line of the table."""
    start = time.perf_counter()
    try:
        found = nf.analyze(model, loss, batches, settings(decay), progress=False).equilibrium
    except nf.NoetherflowError as error:
        return f"{name:36} {decay:7.0e}  {type(error).__name__}: {str(error)[:100]}"
    seconds = time.perf_counter() - start
    counts = Counter(outcome.status.name.lower() for outcome in found.outcomes.values())
    endings = ", ".join(f"{count} {status}" for status, count in counts.items())
    checks = []
    for holds in (
        lambda: function_is_unchanged(model, loss, batches, found),
        lambda: forces_balance(model, loss, batches, found, settings(decay)),
    ):
        try:
            holds()
            checks.append("ok")
        except AssertionError as error:
            checks.append(f"FAILS {error}")
    return f"{name:36} {decay:7.0e} {found.passes:6d} {seconds:7.1f}  {' '.join(checks)}  {endings or 'no symmetry'}"


def _of_the_zoo(name: str) -> Subject:
    """A model of the zoo, its loss and its only batch."""
    (animal,) = (animal for animal in zoo.ZOO if animal.name == name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, loss, batch = animal.build()
    return model, loss, [batch]


SUBJECTS: dict[str, Callable[[], Subject]] = {
    **{animal.name: partial(_of_the_zoo, animal.name) for animal in zoo.ZOO},
    **{f"Hugging Face {name}": partial(hugging_face.subject, name) for name in hugging_face.NAMES},
}


def main(words: Sequence[str]) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{'model':36} {'decay':>7} passes seconds  unchanged, at rest, endings")
    for name, build in SUBJECTS.items():
        if not words or any(word in name for word in words):
            for decay in DECAYS:
                print(_row(name, *build(), decay), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
