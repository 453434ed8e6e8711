"""All generators of small models: what is known of each architecture, and that the finder misses none."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import noetherflow as nf
from zoo import ZOO, Adapted, Animal, Call, Gated, RMSNorm, regression, sequential

# Symmetric generators beyond those of the finder would be news; these have some that act within no axis.
SMALL = [animal for animal in ZOO if animal.name in {
    "leaky ReLU in place", "PReLU", "linear chain", "linear chain with biases", "tanh", "GELU", "SiLU", "ReLU squared",
    "SwiGLU", "GeGLU", "ReGLU", "bilinear gate", "RMSNorm", "RMSNorm by hand", "LayerNorm", "norm without eps",
    "weight norm", "embedding", "tied embedding", "module used twice", "branches", "adapter", "matrix factorisation",
}]  # fmt: skip


@pytest.mark.parametrize("animal", SMALL, ids=lambda animal: animal.name)
def test_the_finder_misses_none_and_invents_none(animal: Animal) -> None:
    result = nf.check_completeness(*animal.build())
    assert result.complete, (result.found, result.discovered, result.missing, result.false, result.discovery.gap)
    assert result.found == animal.dimension


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
        assert nf.verify_symmetry(symmetry, model, loss, batch) < 1e-9


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


def test_a_large_model_is_refused_with_a_way_out() -> None:
    model, loss, batch = sequential((10,), (10,), nn.Linear(10, 10))
    with pytest.raises(nf.SettingsError, match=r"110\^2.*find_symmetries"):
        nf.discover_generators(model, loss, batch)
