"""All generators of small models: what is known of each architecture, and that the finder misses none."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import noetherflow as nf
import random_nets
from noetherflow.discover.equations import Thresholds, null_space
from zoo import ZOO, Adapted, Animal, Call, Gated, RMSNorm, hugging, regression, sequential


def trainable(animal: Animal) -> int:
    return sum(one.numel() for one in animal.build()[0].parameters() if one.requires_grad)


SIZES = {animal.name: trainable(animal) for animal in ZOO}
# With more parameters than this, all generators of a model take more than five seconds.
LONG = 46
# Gradients that leave out a scale are no gradients of a function: their null space is undecided.
LEFT_OUT = {"a scale without gradients"}
# Complex parameters are refused in a sentence.
REFUSED = {"Fourier neural operator"}
SMALL = [
    pytest.param(animal, marks=[pytest.mark.slow] if SIZES[animal.name] > LONG else [], id=animal.name)
    for animal in ZOO
    if SIZES[animal.name] <= 80 and animal.name not in LEFT_OUT | REFUSED
]
MIDDLE = [animal for animal in ZOO if 80 < SIZES[animal.name] <= 1500]


@pytest.mark.parametrize("animal", SMALL)
def test_the_finder_misses_none_and_invents_none(animal: Animal) -> None:
    result = nf.check_completeness(*animal.build())
    assert result.complete, (result.found, result.discovered, result.missing, result.false, result.discovery.gap)
    assert result.found == animal.dimension


@pytest.mark.parametrize("animal", [animal for animal in ZOO if animal.name in REFUSED], ids=lambda animal: animal.name)
def test_complex_parameters_are_refused(animal: Animal) -> None:
    with pytest.raises(nf.SettingsError, match=r"complex, and the discovery of symmetries draws real numbers"):
        nf.check_completeness(*animal.build())


@pytest.mark.parametrize("animal", MIDDLE, ids=lambda animal: animal.name)
def test_the_finder_misses_no_rescaling_and_invents_none(animal: Animal) -> None:
    result = nf.check_completeness(*with_large_eps(animal))
    assert result.complete, (result.found, result.discovered, result.missing, result.false, result.discovery.gap)
    # Symmetric matrices count by their diagonals here.
    assert result.found == animal.rescalings


def with_large_eps(animal: Animal) -> tuple[nn.Module, Any, Any]:
    """So large that scale invariance in front of a norm, exact up to the eps, is not taken for exact."""
    model, loss, batch = animal.build()
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if getattr(module, name, None):
                setattr(module, name, 1.0)
    return model, loss, batch


def test_an_eps_that_rounding_hides_is_none() -> None:
    """BERT's is 1e-12: its residual streams can be scaled, which the finder calls approximate."""
    model, loss, batch = hugging("bert")
    # The gradient of a padding row leaves out what is read of it, so that no symmetry moves it rightly.
    model.get_input_embeddings().padding_idx = None
    result = nf.check_completeness(model, loss, batch)
    assert (result.found, result.missing, result.false) == (40, 5, 0)
    exact, approximate = (nf.find_symmetries(model, loss, batch, approximate=one) for one in (False, True))
    assert len(approximate) - len(exact) == 5


@pytest.mark.parametrize("name", ["ReLU MLP", "shortcut", "attention, partly rotary", "Llama"])
def test_sums_over_axes_find_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (animal,) = (animal for animal in ZOO if animal.name == name)
    entries = nf.discover_rescalings(*animal.build(), progress=False)
    monkeypatch.setattr("noetherflow.discover.rescalings.MOST_ENTRIES", 0)
    sums = nf.discover_rescalings(*animal.build(), progress=False)
    assert sums.decided
    assert entries.decided
    flat = [torch.cat([x.flatten(1) for x in one.exponents.values()], 1) for one in (entries, sums)]
    assert len(flat[0]) == len(flat[1]) == torch.linalg.matrix_rank(torch.cat(flat), rtol=1e-8)


def axes_of_a_head(*, bias: bool = True) -> list[nf.Axis]:
    """The values of the second head of GPT-2's first block, packed with queries and keys, and what reads them."""
    block = "transformer.h.0.attn."
    axes = [nf.Axis(block + "c_attn.weight", 1, 20, 24), nf.Axis(block + "c_proj.weight", 0, 4, 8)]
    return [*axes, nf.Axis(block + "c_attn.bias", 0, 20, 24)] if bias else axes


def test_axes_of_a_large_model_are_asked_on_their_own() -> None:
    model = hugging("gpt2")
    found = nf.discover_blocks(*model, axes_of_a_head(), progress=False)
    assert found.decided, found.gap
    assert (found.count, len(found.antisymmetric[0]), found.others) == (10, 6, 0)
    assert torch.allclose(found.symmetric[0], -found.symmetric[1])
    assert torch.allclose(found.symmetric[0], found.symmetric[2])
    forgotten = nf.discover_blocks(*model, axes_of_a_head(bias=False), progress=False)
    assert (forgotten.count, len(forgotten.antisymmetric[0]), forgotten.others) == (0, 0, 0)


def test_what_acts_on_no_tensor_is_no_generator() -> None:
    """Scaling the rows of a map up and its columns down leaves it where it is."""
    model = sequential((3,), (2,), nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2))
    found = nf.discover_blocks(*model, [nf.Axis("0.weight", 0), nf.Axis("0.weight", 1)], progress=False)
    assert (found.count, len(found.antisymmetric[0]), found.others) == (0, 0, 0)


def test_blocks_that_cannot_be_asked_are_refused() -> None:
    model = sequential((3,), (100,), nn.Linear(3, 100))
    with pytest.raises(nf.SettingsError, match=r"10000 unknowns.*6400"):
        nf.discover_blocks(*model, [nf.Axis("0.weight", 0)])
    with pytest.raises(nf.SettingsError, match="no axes"):
        nf.discover_blocks(*model, [])
    with pytest.raises(nf.ParameterNameError, match="weihgt"):
        nf.discover_blocks(*model, [nf.Axis("0.weihgt", 0)])
    with pytest.raises(nf.SettingsError, match=r"6606 rows and columns.*6400"):
        nf.discover_rescalings(*sequential((3,), (3,), nn.Linear(3, 3300, bias=False), nn.Linear(3300, 3, bias=False)))


class Scores(nn.Module):
    """Queries times keys, without and with a rotation of each by its position."""

    def __init__(self, *, rotary: bool) -> None:
        super().__init__()
        self.q, self.k, self.rotary = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False), rotary

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        if self.rotary:
            angle = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.3]).repeat(2)
            turn = [torch.cos(angle).to(x.dtype), torch.sin(angle).to(x.dtype)]
            q, k = (one * turn[0] + torch.cat([-one[..., 2:], one[..., :2]], -1) * turn[1] for one in (q, k))
        return q @ k.mT


@pytest.mark.parametrize(
    ("symmetric", "build"),
    [
        (15, lambda: sequential((2,), (2,), nn.Linear(2, 5, bias=False), nn.Linear(5, 2, bias=False))),
        (5, lambda: sequential((2,), (2,), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))),
        (3, lambda: sequential((2,), (2,), nn.Linear(2, 3), Call(lambda x: torch.relu(x) ** 2), nn.Linear(3, 2))),
        (4, lambda: regression(Gated(functional.silu), (3,), (3,))),
        (8, lambda: regression(Gated(torch.relu), (3,), (3,))),
        (4, lambda: sequential((4,), (3,), RMSNorm(4), nn.Linear(4, 3, bias=False))),
        (10, lambda: regression(Scores(rotary=False), (5, 3), (5, 5))),
        (2, lambda: regression(Scores(rotary=True), (5, 3), (5, 5))),
        (3, lambda: regression(Adapted(), (4,), (5,))),
        (0, lambda: sequential((2,), (2,), nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))),
        (0, lambda: sequential((2,), (2,), nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 2))),
    ],
)
def test_what_is_known_is_discovered(symmetric: int, build: object) -> None:
    found = nf.discover_generators(*build(), progress=False)
    assert found.decided, found.gap
    assert len(found.symmetric) == symmetric


def test_charges_may_depend_on_each_other() -> None:
    model, loss, batch = sequential((2,), (2,), nn.Linear(2, 5, bias=False), nn.Linear(5, 2, bias=False))
    found = nf.discover_generators(model, loss, batch)
    assert (len(found.symmetric), len(found.antisymmetric), found.charges) == (15, 10, 14)
    for symmetry in found.symmetries[:3]:
        assert nf.verify_symmetry(model, loss, batch, symmetry) < 1e-9


def test_dead_directions_are_no_news() -> None:
    """The softmax does not see a shift of all scores."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3))
    batch = torch.randn(6, 2), torch.randint(3, (6,))
    found = nf.discover_generators(
        model, lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1], reduction="none"), batch
    )
    assert len(found.dead) == 4
    assert len(found.symmetric) == 3
    assert found.decided


def test_a_finder_that_misses_one_or_invents_one_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, batch = sequential((3,), (2,), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    monkeypatch.setattr("noetherflow.discover.completeness.find_symmetries", lambda *_: {})
    missed = nf.check_completeness(model, loss, batch)
    assert (missed.missing, missed.false, missed.complete) == (4, 0, False)
    wrong = {"forgot the bias": nf.DiagonalSymmetry([nf.Axis("0.weight", 0)], [nf.Axis("2.weight", 1)])}
    monkeypatch.setattr("noetherflow.discover.completeness.find_symmetries", lambda *_: wrong)
    invented = nf.check_completeness(model, loss, batch)
    assert (invented.missing, invented.false) == (4, 4)


@pytest.mark.parametrize(
    ("small", "count", "clear"), [(1e-15, 1, True), (1e-5, 0, True), (1e-10, 1, False), (3e-8, 0, False)]
)
def test_singular_values_between_zero_and_clearly_more_are_not_clear(small: float, count: int, clear: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    rows[:, 3] *= small
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    thresholds = Thresholds.of(torch.float64)
    null = null_space(rows @ rotation, thresholds)
    assert (len(null.vectors), null.is_clear(thresholds)) == (count, clear), null.gap
    if count:
        torch.testing.assert_close((null.vectors @ rotation.mT).abs()[0, 3], torch.tensor(1.0).double())


@pytest.mark.parametrize("decided", [True, False])
def test_a_comparison_with_an_undecided_search_is_not_complete(decided: bool) -> None:
    assert nf.Completeness(0, 0, 0, 0, nf.Rescalings({}, {}, (0.0, 1.0), decided)).complete == decided


def test_a_large_model_is_refused_with_a_way_out() -> None:
    model, loss, batch = sequential((10,), (10,), nn.Linear(10, 10))
    with pytest.raises(nf.SettingsError, match=r"110\^2.*find_symmetries"):
        nf.discover_generators(model, loss, batch)


SEARCHES = {
    "generators": nf.discover_generators,
    "rescalings": nf.discover_rescalings,
    "blocks": lambda *built: nf.discover_blocks(*built, [nf.Axis("0.weight", 0)]),
    "completeness": nf.check_completeness,
}


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_where_nothing_is_trained_there_is_nothing_to_find(search: Any) -> None:
    model, loss, batch = sequential((2,), (2,), nn.Linear(2, 2), nn.ReLU())
    for untrained in (model.requires_grad_(False), nn.Sequential(nn.ReLU())):
        with pytest.raises(nf.FrozenParameterError, match=r"no parameter that requires gradients.*Unfreeze"):
            search(untrained, loss, batch)
    model[0].bias.requires_grad_()
    if search is not SEARCHES["blocks"]:
        search(model, loss, batch)


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_a_loss_without_any_gradient_leaves_the_search_undecided(search: Any) -> None:
    model, _, batch = sequential((2,), (2,), nn.Linear(2, 2))
    result = search(model, lambda model, batch: 0 * model(batch[0]).sum(1), batch)
    if isinstance(result, nf.Completeness):
        assert (result.complete, result.missing, result.false) == (False, 0, 0)
        result = result.discovery
    assert not result.decided
    assert "random points had fewer" in result.note
    assert (len(result.symmetric[0]) if isinstance(result, nf.Blocks) else count_of(result)) == 0


def count_of(result: Any) -> int:
    return len(result.symmetric) if isinstance(result, nf.Discovery) else result.count


def test_entries_without_a_gradient_have_no_rescalings() -> None:
    model = nn.Sequential(nn.Embedding(7, 2), nn.Linear(2, 2, bias=False))
    batch = torch.tensor([0, 1, 2, 5]), torch.randn(4, 2)
    result = nf.discover_rescalings(model, random_nets.squared_sum, batch, progress=False)
    assert (result.count, result.decided) == (2, True)
    assert result.reached["0.weight"].tolist() == [[1.0] * 2] * 3 + [[0.0] * 2] * 2 + [[1.0] * 2, [0.0] * 2]


def test_one_axis_may_be_dead_while_another_is_not() -> None:
    model, _, batch = sequential((2,), (2,), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    axes = [nf.Axis("0.weight", 0), nf.Axis("2.bias", 0)]
    found = nf.discover_blocks(model, lambda model, batch: model[1](model[0](batch[0])).square().sum(1), batch, axes)
    assert found.decided
    assert (found.count, len(found.antisymmetric[1]), found.others) == (0, 0, 0)
