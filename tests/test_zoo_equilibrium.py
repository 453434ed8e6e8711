"""Every model of the zoo comes to rest: no exception, an unchanged function, no drift where convergence is claimed."""

import dataclasses

import pytest
import torch

import noetherflow as nf
import resting
import zoo

# One of each kind of block: scalings, a matrix, blocks that share tensors, directions at infinity, no symmetry.
SHORT = {
    "ReLU MLP",
    "linear chain with biases",
    "convolution in one dimension",
    "weight norm",
    "attention, partly rotary",
    "nn.MultiheadAttention, norm first",
    "tanh",
}
# The noise of complex parameters is refused.
REFUSED = {"Fourier neural operator"}
names = [animal.name for animal in zoo.ZOO if animal.name not in REFUSED]
every = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SHORT else [pytest.mark.slow]) for name in names]
)
decays = pytest.mark.parametrize("decay", resting.DECAYS)


def test_the_short_sweep_is_a_part_of_the_zoo() -> None:
    assert len(names) == 88 - len(REFUSED)
    assert set(names) > SHORT


@every
@decays
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # of reentrant checkpoints
def test_a_model_of_the_zoo_comes_to_rest(name: str, decay: float) -> None:
    model, loss, batches = resting.SUBJECTS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sgd = resting.settings(decay)
    equilibrium = nf.equilibrate(model, loss, batches, sgd, progress=False)
    analysis = nf.analyze(model, loss, batches, sgd, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [report.status for report in analysis.reports] == [
        outcome.status.name.lower() for outcome in equilibrium.outcomes.values()
    ]
    assert analysis.equilibrium.passes == equilibrium.passes
    for found in (equilibrium, analysis.equilibrium):
        resting.function_is_unchanged(model, loss, batches, found)
    resting.forces_balance(model, loss, batches, equilibrium, sgd)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_model_whose_noise_is_not_measured_is_refused(name: str) -> None:
    model, loss, batches = resting.SUBJECTS[name]()
    with pytest.raises(nf.SettingsError, match="complex parameters is not measured"):
        nf.equilibrate(model, loss, batches, resting.settings(0.0), progress=False)


def test_a_search_that_ended_early_does_not_balance() -> None:
    model, loss, batches = resting.SUBJECTS["nn.MultiheadAttention, norm first"]()
    sgd = resting.settings(1e-3)
    early = nf.equilibrate(model, loss, batches, sgd, max_passes=3, progress=False)
    assert early.status is nf.Status.NOT_CONVERGED
    claimed = dataclasses.replace(early, outcomes=dict.fromkeys(early.outcomes, nf.Outcome(nf.Status.CONVERGED)))
    with pytest.raises(AssertionError):
        resting.forces_balance(model, loss, batches, claimed, sgd)


def test_parameters_off_the_orbit_change_the_function() -> None:
    model, loss, batches = resting.SUBJECTS["ReLU MLP"]()
    found = nf.equilibrate(model, loss, batches, resting.settings(1e-3), progress=False)
    off = dataclasses.replace(found, params={**found.params, "0.weight": found.params["0.weight"] * (1 + 1e-9)})
    with pytest.raises(AssertionError):
        resting.function_is_unchanged(model, loss, batches, off)
