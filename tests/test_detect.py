"""Finding symmetries: all that are there, none that are not, and each proved."""

import json
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow._precision import TOLERANCES
from noetherflow.detect.rules import RULES
from zoo import ZOO, Animal, Attention, Vision, encoder, hugging, regression, sequential


def kinds(symmetries: dict[str, nf.Symmetry], model: nn.Module) -> Counter[tuple[str, int]]:
    params = dict(model.named_parameters())
    return Counter(
        (type(one).__name__.removesuffix("Symmetry").lower(), one.dimension(params)) for one in symmetries.values()
    )


def off_zero(model: nn.Module) -> None:
    """Away from where layers start: a bias that is zero is forgotten without a trace."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.1 * torch.randn(one.shape, generator=generator))


def in_double(batch: Any) -> Any:
    if isinstance(batch, tuple):
        return tuple(map(in_double, batch))
    return batch.double() if batch.is_floating_point() else batch


@pytest.mark.filterwarnings("ignore:computed in torch.float32, because:UserWarning")
@pytest.mark.parametrize("animal", ZOO, ids=lambda animal: animal.name)
def test_what_is_found_is_what_is_there(animal: Animal) -> None:
    model, loss, batch = animal.build()
    # A padding row has to stay zero: what is read of it has no gradient. B of LoRA is zero, which must not matter.
    if animal.name not in ("BERT", "LoRA at its start"):
        off_zero(model)
    explanation = nf.explain(model, loss, batch)
    assert not explanation.rejected
    assert kinds(explanation.symmetries, model) == Counter(animal.expected)
    silent = [note for note in explanation.axes if not (note.symmetries or note.reason)]
    assert not silent, "an axis without a symmetry has a reason"


def test_the_zoo_is_large() -> None:
    assert len({animal.name for animal in ZOO}) == len(ZOO) >= 65


# What a null space counts, drawn at random parameters outside of this package.
RESCALINGS = {
    "BLOOM": 64, "Falcon": 44, "DeepSeek-V3": 88, "Swin": 72, "GPT-J": 60, "ModernBERT": 68,
    "Mixtral, two experts": 72, "GPT-NeoX": 76, "Phi-3": 72, "Qwen2": 72,
}  # fmt: skip


@pytest.mark.parametrize("name", RESCALINGS)
def test_what_arithmetic_gives_is_what_a_null_space_counts(name: str) -> None:
    (animal,) = (animal for animal in ZOO if animal.name == name)
    assert animal.rescalings == RESCALINGS[name]


@pytest.mark.filterwarnings("ignore:computed in torch.float32, because:UserWarning")
@pytest.mark.parametrize(
    "animal",
    [
        pytest.param(animal, marks=[pytest.mark.slow] if animal.slow else [], id=animal.name)
        for animal in ZOO
        if animal.dimension
    ],
)
def test_each_is_a_symmetry_on_its_own(animal: Animal) -> None:
    """By the slow check, one by one; what is found together is proved together."""
    model, loss, batch = animal.build()
    for name, symmetry in nf.find_symmetries(model, loss, batch).items():
        if not animal.coarse:
            wide = nf.verify_symmetry(model, loss, in_double(batch), symmetry, dtype=torch.float64)
            assert wide < 1e-12, (name, wide)
        narrow = nf.verify_symmetry(model, loss, batch, symmetry, dtype=torch.float32)
        limit = 5e-6 if narrow.precision == torch.float32 else TOLERANCES[narrow.precision].proof
        assert narrow < limit, (name, narrow)


# Not the bias of K: what it adds to all scores of a query goes with the softmax.
FORGOTTEN = [
    ("a bias of Q", lambda: regression(Attention(), (5, 6), (5, 6)), "Q-K", "q.bias"),
    ("a bias of V", lambda: regression(Attention(), (5, 6), (5, 6)), "V-O", "v.bias"),
    ("a packed bias", lambda: encoder(norm_first=True), "V-O", "self_attn.in_proj_bias"),
    ("the bias of a norm", lambda: encoder(norm_first=True), "norm1", "norm1.bias"),
    ("a bias of a neuron", lambda: encoder(norm_first=True), "linear1 -> linear2", "linear1.bias"),
]


@pytest.mark.parametrize(
    ("build", "part", "parameter"), [case[1:] for case in FORGOTTEN], ids=[c[0] for c in FORGOTTEN]
)
def test_what_is_forgotten_breaks_it(build: Any, part: str, parameter: str) -> None:
    """The twin: without one tensor the residual is no rounding."""
    model, loss, batch = build()
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.3 * torch.randn(one.shape, generator=torch.Generator().manual_seed(3)))
    name, symmetry = next((name, one) for name, one in nf.find_symmetries(model, loss, batch).items() if part in name)
    plus, minus = ([axis for axis in axes if axis.name != parameter] for axes in (symmetry.plus, symmetry.minus))
    assert len(plus) + len(minus) < len(symmetry.plus) + len(symmetry.minus), name
    broken = type(symmetry)(plus, minus)
    assert nf.verify_symmetry(model, loss, batch, symmetry) < 1e-12
    assert nf.verify_symmetry(model, loss, batch, broken) > 1e-3


def test_a_head_of_a_group_that_is_forgotten_breaks_it() -> None:
    model, loss, batch = regression(Attention(4, 2), (5, 6), (5, 6))
    found = nf.find_symmetries(model, loss, batch)
    symmetry = next(one for name, one in found.items() if "V-O" in name)
    assert len(symmetry.minus) == 2
    assert nf.verify_symmetry(model, loss, batch, type(symmetry)(symmetry.plus, symmetry.minus[:1])) > 1e-3


def test_llama_in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its norms cast to float32: without them a check in float64 means what it says."""

    def forward(norm: nn.Module, x: Tensor) -> Tensor:
        return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", forward)
    model, loss, batch = hugging("llama")
    with torch.no_grad():
        for one in model.parameters():
            one.mul_(10)  # far from the point where nothing matters
    for name, symmetry in nf.find_symmetries(model, loss, batch).items():
        residual = nf.verify_symmetry(model, loss, batch, symmetry)
        assert residual < 1e-12, (name, residual)
        # The twin: with one side alone the loss does change, so that the check above is not vacuous.
        assert nf.verify_symmetry(model, loss, batch, type(symmetry)(symmetry.plus)) > 1e-3, name


def test_the_residual_stream_of_a_net_with_norms_first_scales_up_to_eps() -> None:
    model, loss, batch = regression(Vision().eval(), (2, 4, 4), (2,))
    exact = nf.find_symmetries(model, loss, batch)
    nearly = {one.name: one for one in nf.explain(model, loss, batch, approximate=True).found if one.name not in exact}
    (stream,) = nearly.values()
    assert isinstance(stream.symmetry, nf.ScalarSymmetry)
    assert {axis.name for axis in stream.symmetry.plus} >= {
        "patch.weight",
        "token",
        "positions",
        "block.linear2.weight",
    }
    assert not stream.symmetry.minus
    assert 1e-9 < stream.residual < 1e-2
    assert "eps" in stream.small


def test_names_say_where_it_is() -> None:
    names = list(nf.find_symmetries(*hugging("gpt2")))
    assert names[:6] == [
        "transformer.h.0: ln_1 -> attn.c_attn",
        "transformer.h.0.attn: Q-K head 0",
        "transformer.h.0.attn: Q-K head 1",
        "transformer.h.0.attn: V-O head 0",
        "transformer.h.0.attn: V-O head 1",
        "transformer.h.0: ln_2 -> mlp.c_fc",
    ]


def test_the_mode_of_the_model_counts() -> None:
    linear, loss, batch = sequential((3,), (2,), nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    assert kinds(nf.find_symmetries(linear, loss, batch), linear) == {("matrix", 10): 1}
    linear.train()
    assert kinds(nf.find_symmetries(linear, loss, batch), linear) == {("diagonal", 4): 1}
    norm, loss, batch = sequential((3,), (2,), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    assert not nf.find_symmetries(norm, loss, batch, approximate=True)
    norm.train()
    assert not nf.find_symmetries(norm, loss, batch)
    assert kinds(nf.find_symmetries(norm, loss, batch, approximate=True), norm) == {("diagonal", 4): 1}


def test_what_is_frozen_is_never_moved() -> None:
    model, loss, batch = sequential((4,), (2,), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    model[2].requires_grad_(False)
    assert not nf.find_symmetries(model, loss, batch)
    explanation = nf.explain(model, loss, batch)
    assert {note.reason for note in explanation.axes if note.parameter.startswith("2.")} == {"frozen"}
    model[2].weight.requires_grad_(True)
    assert list(nf.find_symmetries(model, loss, batch)) == ["0 -> 2"]


def test_an_approximate_one_is_found_on_request_and_says_how_far_it_is() -> None:
    model, loss, batch = sequential((3,), (4,), nn.Linear(3, 4), nn.LayerNorm(4, eps=1e-5), nn.Tanh())
    assert not nf.find_symmetries(model, loss, batch)
    explanation = nf.explain(model, loss, batch, approximate=True)
    (finding,) = explanation.found
    assert "eps = 1e-05" in finding.small
    assert 1e-8 < finding.residual < 1e-2
    assert isinstance(finding.symmetry, nf.ScalarSymmetry)


def test_the_reason_is_told() -> None:
    model, loss, batch = sequential((4,), (2,), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    explanation = nf.explain(model, loss, batch)
    reasons = {(note.parameter, note.axis): note.reason for note in explanation.axes}
    assert reasons["0.weight", 0] == reasons["0.bias", 0] == "tanh (1)"
    assert "tanh (1)" in str(explanation)
    assert json.loads(json.dumps(explanation.to_json()))["symmetries"] == []


def test_an_explanation_as_json_says_which_axes_grow_and_which_shrink() -> None:
    layers = nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
    explanation = nf.explain(*sequential((2, 4, 4), (2,), *layers))
    written = json.loads(json.dumps(explanation.to_json()))
    (found,) = written["symmetries"]
    plain = {"start": None, "stop": None, "within": None}
    assert found["name"] == "0 -> 3"
    assert found["plus"] == [{"parameter": f"0.{name}", "dim": 0, "repeat": 1} | plain for name in ("weight", "bias")]
    assert found["minus"] == [{"parameter": "3.weight", "dim": 1, "repeat": 4} | plain]
    assert found["residual"] == explanation.found[0].residual < 1e-12
    assert found["diagonal_because_of"] == "relu (1)"
    assert written["rejected"] == []
    acting = {(axis["parameter"], axis["axis"]): axis["symmetries"] for axis in written["axes"]}
    assert acting["3.weight", 1] == acting["0.weight", 0] == acting["0.bias", 0] == ["0 -> 3"]
    assert acting["3.weight", 0] == acting["0.weight", 1] == []
    shown = str(explanation)
    row = next(line for line in shown.splitlines() if line.strip().startswith("0 -> 3"))
    assert row.index("0.weight 0") < row.index("3.weight 1 x4")


class Shifted(nn.Module):
    """Hidden units to which a part of the batch is added."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.outer(torch.relu(self.inner(x)) + shift)


def test_what_is_zero_in_this_batch_need_not_be_in_the_next() -> None:
    """Numbers of this batch cannot tell: the graph has to."""
    model = Shifted()
    batch = torch.randn(4, 3), torch.zeros(4, 4), torch.randn(4, 2)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return (model(*batch[:2]) - batch[2]).square().mean(1)

    hidden = nf.DiagonalSymmetry([nf.Axis("inner.weight", 0), nf.Axis("inner.bias", 0)], [nf.Axis("outer.weight", 1)])
    assert nf.verify_symmetry(model, loss, batch, hidden) < 1e-12
    assert not nf.find_symmetries(model, loss, batch)
    # Zeros that belong to the model are zeros for good.
    fixed = torch.zeros(4, 4)
    found = nf.find_symmetries(model, lambda model, batch: loss(model, (batch[0], fixed, batch[2])), batch)
    assert list(found) == ["inner -> outer"]


def test_a_number_of_this_batch_need_not_be_zero_in_the_next() -> None:
    """A number that is read out of the batch by item() is zero only now."""
    model = Shifted()
    batch = torch.randn(4, 3), torch.zeros(4, 4), torch.randn(4, 2)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return (model(batch[0], batch[1].sum().item()) - batch[2]).square().mean(1)

    assert not nf.find_symmetries(model, loss, batch)


class Kept(nn.Module):
    """Hidden units plus a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)
        self.shift = nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.relu(self.inner(x)) + self.shift)


def test_frozen_zeros_may_be_other_numbers_in_the_next_checkpoint() -> None:
    explanation = nf.explain(*regression(Kept(), (3,), (2,)))
    assert not explanation.symmetries
    assert not explanation.rejected


class Routed(nn.Module):
    """Each position is mapped by the expert that a router chooses, between maps that all experts share."""

    def __init__(self, *, combined: bool) -> None:
        super().__init__()
        self.router, self.combined = nn.Linear(3, 2, bias=False), combined
        self.up, self.down = nn.Parameter(torch.randn(2, 3, 4)), nn.Parameter(torch.randn(2, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        h = torch.relu(x.unsqueeze(-2) @ self.up[chosen])
        if self.combined:
            h = h + h.mean(1, keepdim=True)
        return (h @ self.down[chosen]).squeeze(-2)


@pytest.mark.parametrize(("combined", "expected"), [(False, {("diagonal", 4): 2}), (True, {("diagonal", 4): 1})])
def test_experts_whose_positions_are_combined_scale_alike(combined: bool, expected: Any) -> None:
    model, loss, batch = regression(Routed(combined=combined), (5, 3), (5, 2), count=6)
    explanation = nf.explain(model, loss, batch)
    assert not explanation.rejected
    # The scale of the router, of which only the largest score counts, is another symmetry.
    found = kinds(explanation.symmetries, model)
    assert {kind: count for kind, count in found.items() if kind[1] == 4} == expected


class GatedExperts(nn.Module):
    """Experts whose rows are first a value, read by silu, and then a gate."""

    def __init__(self, *, gate_first: bool) -> None:
        super().__init__()
        self.norm, self.router, self.gate_first = nn.RMSNorm(5), nn.Linear(5, 2, bias=False), gate_first
        self.up, self.down = nn.Parameter(torch.randn(2, 8, 5)), nn.Parameter(torch.randn(2, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        weights, chosen = self.router(x).softmax(-1).max(-1)
        first, second = (self.up[chosen] @ x.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        gate, value = (first, second) if self.gate_first else (second, first)
        h = torch.nn.functional.silu(gate) * value
        return (self.down[chosen] @ h.unsqueeze(-1)).squeeze(-1) * weights.unsqueeze(-1)


@pytest.mark.parametrize("gate_first", [True, False])
def test_what_is_left_of_a_gauge_is_kept_where_most_exponents_are_equal(gate_first: bool) -> None:
    """The norm has a single symmetry with a row per channel, whatever the order of the rows of the experts."""
    model, loss, batch = regression(GatedExperts(gate_first=gate_first), (6, 5), (6, 2))
    assert kinds(nf.find_symmetries(model, loss, batch), model) == {("diagonal", 5): 1, ("diagonal", 4): 2}


class Centred(nn.Module):
    """A running mean by hand, which is zero before the first step of training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x - self.mean)


def test_a_running_mean_that_is_zero_now_ties_what_it_is_subtracted_from() -> None:
    explanation = nf.explain(*sequential((3,), (2,), nn.Linear(3, 4), Centred(), nn.Linear(4, 2)))
    assert not explanation.symmetries
    assert not explanation.rejected


class Given(nn.Module):
    """Activations divided by their largest absolute value, which is computed without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.abs().amax(1, keepdim=True)
        return x / scale


def test_a_scale_that_no_gradient_reaches_lets_nothing_through() -> None:
    """The loss does not change under a scaling, but its gradients are not those of this function."""
    explanation = nf.explain(*sequential((3,), (4,), nn.Linear(3, 4), Given(), nn.Tanh()))
    assert not explanation.symmetries
    assert not explanation.rejected
    assert any("detach" in note.reason for note in explanation.axes)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.special.bessel_j0(self.inner(x)))


def test_an_operation_that_is_not_known_lets_nothing_through_and_is_named() -> None:
    explanation = nf.explain(*regression(Unknown(), (3,), (2,)))
    assert not explanation.found
    assert any("bessel_j0" in note.reason for note in explanation.axes)


class Undecided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.inner(x))
        return self.outer(hidden) if hidden.sum() > 0 else self.outer(2 * hidden)


def test_a_model_that_cannot_be_exported_says_so_and_takes_declared_symmetries() -> None:
    model, loss, batch = regression(Undecided(), (3,), (2,))
    with pytest.raises(nf.TraceError, match=r"cannot be written down.*by hand"):
        nf.find_symmetries(model, loss, batch)
    hidden = nf.DiagonalSymmetry([nf.Axis("inner.weight", 0), nf.Axis("inner.bias", 0)], [nf.Axis("outer.weight", 1)])
    assert nf.verify_symmetry(model, loss, batch, hidden) < 1e-12


def test_a_candidate_that_the_numbers_refute_is_reported_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that is wrong, planted."""
    monkeypatch.setitem(RULES, "aten::tanh", RULES["aten::relu"])
    layers = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)
    model, loss, batch = sequential((3,), (2,), *layers)
    with pytest.warns(UserWarning, match=r"0 -> 2: the graph allows this symmetry, the numbers do not"):
        assert list(nf.find_symmetries(model, loss, batch)) == ["2 -> 4"]
    explanation = nf.explain(model, loss, batch)
    assert [one.name for one in explanation.rejected] == ["0 -> 2"]
    assert "REJECTED" in str(explanation)


def test_nothing_changes_behind_the_users_back() -> None:
    model, loss, batch = sequential(
        (3, 4, 4), (2,), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2)
    )
    model.train()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    state = torch.get_rng_state()
    nf.find_symmetries(model, loss, batch)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(one.grad is None for one in model.parameters())
