"""Architectures of Hugging Face Transformers as they come: find, measure, solve; a status for every symmetry."""

import pytest

import hugging_face
import noetherflow as nf
import resting

# Models without float64, whose experts are multiplied by a kernel of coarser types.
COARSE = {"Mixtral", "DeepSeek-V3"}
SHORT = {"ConvNeXt", "Mamba"}
names = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SHORT else [pytest.mark.slow]) for name in hugging_face.NAMES],
)


# A norm with eps in DeepSeek-V3 is nearly blind to the scale of the layer before.
@pytest.mark.filterwarnings("ignore:.*the graph allows this symmetry:UserWarning")
@names
@pytest.mark.parametrize("decay", resting.DECAYS)
def test_a_model_gets_an_answer(name: str, decay: float) -> None:
    model, loss, batches = resting.SUBJECTS[f"Hugging Face {name}"]()
    sgd = resting.settings(decay)
    analysis = nf.analyze(model, loss, batches, sgd, progress=False)
    found = analysis.equilibrium
    assert found.symmetries
    assert [report.name for report in analysis.reports] == list(found.symmetries)
    assert {report.status for report in analysis.reports} <= {status.name.lower() for status in resting.ENDINGS}
    assert any("computed in torch.float32" in note for note in found.notes) is (name in COARSE)
    assert found.potential_after < found.potential_before
    resting.function_is_unchanged(model, loss, batches, found)
    resting.forces_balance(model, loss, batches, found, sgd)
