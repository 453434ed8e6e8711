"""Symmetric generators that do not act along axes are named by `explain`, and only if they hold."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow import _explain
from noetherflow._errors import SettingsError
from noetherflow.detect.find import explain_axes

Subject = tuple[nn.Module, nf.Loss, tuple[Tensor, Tensor]]


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(1)


def regression(model: nn.Module, *sizes: int, outputs: int = 1) -> Subject:
    return model, squares, (torch.randn(8, *sizes), torch.randn(8, outputs))


class Difference(nn.Module):
    """Weights u^2 - v^2, or u^2 - v, for three inputs."""

    def __init__(self, power: int = 2) -> None:
        super().__init__()
        self.u, self.v, self.power = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3)), power

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.u.square() - self.v**self.power)[:, None]


class Rotary(nn.Module):
    """Scores of three positions with a rotary embedding of two pairs, given as matrices."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(2, 4, bias=False), nn.Linear(2, 4, bias=False)
        angles = torch.outer(torch.arange(3), torch.tensor([0.7, 0.2])).double()
        pairs = [torch.stack([torch.stack([a.cos(), -a.sin()]), torch.stack([a.sin(), a.cos()])]) for a in angles.T]
        matrices = torch.stack([torch.block_diag(*(pair[..., t] for pair in pairs)) for t in range(3)])
        if kind == "buffer":
            self.register_buffer("matrices", matrices)
        else:
            self.matrices = matrices if kind == "rotation" else torch.randn(3, 4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        q, k = (torch.einsum("tij,btj->bti", self.matrices.to(x), layer(x)) for layer in (self.q, self.k))
        return torch.softmax(q @ k.mT, -1).flatten(1)


def linear(width: int, inputs: int = 1, between: nn.Module | None = None) -> nn.Module:
    middle = [between] if between else []
    return nn.Sequential(nn.Linear(inputs, width, bias=False), *middle, nn.Linear(width, 1, bias=False))


def projected(generators: tuple[nf.DenseSymmetry, ...]) -> Tensor:
    """The projection on the span of generators of equal names."""
    flat = torch.stack([generator.generator.reshape(-1) for generator in generators])
    basis = torch.linalg.qr(flat.T).Q
    return basis @ basis.T


def test_a_difference_of_squares_has_a_hyperbolic_rotation_for_each_input() -> None:
    explanation = nf.explain(*regression(Difference(), 3))
    assert not explanation.found
    assert [generator.names for generator in explanation.off_axis] == [("u", "v")] * 3
    expected = []
    for k in range(3):
        matrix = torch.zeros(6, 6, dtype=torch.float64)
        matrix[k, k + 3] = matrix[k + 3, k] = 1.0
        expected.append(nf.DenseSymmetry(matrix, ("u", "v")))
    assert torch.allclose(projected(explanation.off_axis), projected(tuple(expected)), atol=1e-9)
    text = str(explanation)
    assert "3  mixes entries  u, v" in text
    assert "nf.discover_generators lists them" in text


def test_a_difference_of_a_square_and_a_number_has_none() -> None:
    explanation = nf.explain(*regression(Difference(power=1), 3))
    assert explanation.off_axis == ()
    assert explanation.off_axis_note.startswith("None")


@pytest.mark.parametrize(("width", "inputs", "count"), [(3, 1, 3), (2, 1, 1), (3, 2, 0), (1, 1, 0)])
def test_linear_layers_between_numbers_have_generators_that_mix_layers(width: int, inputs: int, count: int) -> None:
    """The product a . b of vectors is constant under O(h, h): h^2 symmetric generators, h (h + 1) / 2 along axes."""
    model, loss, batch = regression(linear(width, inputs), inputs)
    explanation = nf.explain(model, loss, batch)
    assert [finding.name for finding in explanation.found] == ["0 -> 1"]
    assert len(explanation.off_axis) == count
    if inputs == 1:
        assert count == width**2 - width * (width + 1) // 2
    for generator in explanation.off_axis:
        assert generator.names == ("0.weight", "1.weight")
        assert nf.verify_symmetry(model, loss, batch, generator) < 1e-11
        # Orthogonal to the symmetry along axes: traces with diag(X, -X) vanish for each symmetric X.
        a, b = generator.generator[:width, :width], generator.generator[width:, width:]
        assert torch.allclose(a - b.mT, torch.zeros_like(a), atol=1e-9)


@pytest.mark.parametrize("between", [nn.ReLU(), nn.Tanh()])
def test_layers_with_an_activation_have_none(between: nn.Module) -> None:
    explanation = nf.explain(*regression(linear(3, between=between), 1))
    assert explanation.off_axis == ()
    assert explanation.off_axis_note.startswith("None")
    assert "Symmetries that do not act along axes\nNone" in str(explanation)


def test_a_generator_acts_on_as_few_parameters_as_possible() -> None:
    model = nn.Sequential(*linear(2), nn.Tanh(), *linear(2))
    explanation = nf.explain(*regression(model, 1))
    assert [generator.names for generator in explanation.off_axis] == [
        ("0.weight", "1.weight"),
        ("3.weight", "4.weight"),
    ]


def test_a_rotary_embedding_as_a_constant_matrix_scales_pairs() -> None:
    explanation = nf.explain(*regression(Rotary("rotation"), 3, 2, outputs=9))
    (generator,) = explanation.off_axis
    # Pairs of rows of q against those of k; along axes the finder has the sum over pairs.
    rows = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat_interleave(2).double()
    diagonal = torch.cat([rows, -rows]) / 4
    assert torch.allclose(generator.generator.abs(), diagonal.diag().abs(), atol=1e-9)
    assert abs(float((generator.generator.diagonal() * diagonal).sum())) == pytest.approx(1.0)
    assert "1  scales entries  q.weight, k.weight" in str(explanation)
    assert nf.explain(*regression(Rotary("any matrix"), 3, 2, outputs=9)).off_axis == ()


def test_generators_of_the_present_values_of_buffers_are_left_out() -> None:
    explanation = nf.explain(*regression(Rotary("buffer"), 3, 2, outputs=9))
    assert explanation.off_axis == ()
    assert explanation.off_axis_note.startswith("None:")
    norm = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1)).eval()
    assert nf.explain(*regression(norm, 2)).off_axis_note.startswith("None:")
    # Discovery draws what a state dict holds; the proof perturbs all buffers.
    norm[1].register_buffer("running_mean", norm[1].running_mean, persistent=False)
    explanation = nf.explain(*regression(norm, 2))
    assert explanation.off_axis == ()
    assert explanation.off_axis_note.endswith("a loss changes at other values of parameters or buffers: 3.")
    assert norm[1].running_mean.eq(0).all()  # the model is not changed


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were searched."""
    models: list[nn.Module] = []

    def search(model: nn.Module, *arguments: Any, **options: Any) -> nf.Discovery:
        models.append(model)
        return nf.discover_generators(model, *arguments, **options)

    monkeypatch.setattr(_explain, "discover_generators", search)
    return models


def test_a_large_model_is_not_searched_and_says_so(searches: list[nn.Module]) -> None:
    large = nf.explain(*regression(linear(17), 1))
    assert large.off_axis == ()
    assert large.off_axis_note.startswith("Only symmetries along axes were searched for. nf.discover_blocks")
    assert not searches
    model = linear(16)
    nf.explain(*regression(model, 1))
    assert searches == [model]


def test_the_finder_and_an_analysis_search_along_axes_only(searches: list[nn.Module]) -> None:
    model, loss, batch = regression(linear(3), 1)
    assert list(nf.find_symmetries(model, loss, batch)) == ["0 -> 1"]
    nf.analyze(model, loss, [batch], nf.SGD(0.1, 8), progress=False)
    assert explain_axes(model, loss, batch).off_axis_note == ""
    assert "do not act along axes" not in str(explain_axes(model, loss, batch))
    assert not searches
    assert nf.explain(model, loss, batch).off_axis_note
    assert searches == [model]


def test_a_search_without_a_decision_lists_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = nf.discover_generators(*regression(linear(3), 1), progress=False)
    undecided = type(found)(**(vars(found) | {"decided": False}))
    monkeypatch.setattr(_explain, "discover_generators", lambda *_, **__: undecided)
    explanation = nf.explain(*regression(linear(3), 1))
    assert explanation.off_axis == ()
    assert explanation.off_axis_note.startswith("Undecided")


def test_a_discovered_generator_that_changes_a_loss_is_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that is wrong, planted: generators of linear layers, for layers with a tanh between them."""
    found = nf.discover_generators(*regression(linear(3), 1), progress=False)
    named = {"0.weight": "0.weight", "1.weight": "2.weight"}
    wrong = type(found)(**(vars(found) | {"names": tuple(named[name] for name in found.names)}))
    monkeypatch.setattr(_explain, "discover_generators", lambda *_, **__: wrong)
    explanation = nf.explain(*regression(linear(3, between=nn.Tanh()), 1))
    assert explanation.off_axis == ()
    assert explanation.off_axis_note.endswith("a loss changes at other values of parameters or buffers: 9.")


def test_a_search_that_fails_leaves_the_symmetries_along_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise SettingsError("no\nfloat64")

    monkeypatch.setattr(_explain, "discover_generators", fail)
    explanation = nf.explain(*regression(linear(3), 1))
    assert [finding.name for finding in explanation.found] == ["0 -> 1"]
    assert explanation.off_axis_note.endswith("nf.discover_generators failed: no float64")


def test_a_model_that_refuses_single_examples_is_explained_along_axes() -> None:
    norm = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1))
    explanation = nf.explain(*regression(norm, 2))
    assert explanation.found
    assert explanation.off_axis == ()
    assert "ValueError: Expected more than 1 value per channel" in explanation.off_axis_note


def test_generators_can_be_declared_and_are_written_as_json() -> None:
    model, loss, batch = regression(Difference(), 3)
    explanation = nf.explain(model, loss, batch)
    symmetries = {str(k): generator for k, generator in enumerate(explanation.off_axis)}
    analysis = nf.analyze(model, loss, [batch], nf.SGD(0.1, 8), {"0": symmetries["0"]}, progress=False)
    assert math.isfinite(analysis.reports[0].charge)
    written = explanation.to_json()
    assert written["off_axis"][0]["parameters"] == ("u", "v")
    assert torch.equal(torch.tensor(written["off_axis"][0]["generator"]), explanation.off_axis[0].generator.float())
    assert written["off_axis_note"] == explanation.off_axis_note


def test_a_frozen_model_has_nothing_to_search() -> None:
    model, loss, batch = regression(linear(3), 1)
    model.requires_grad_(False)
    assert nf.explain(model, loss, batch).off_axis_note == ""
