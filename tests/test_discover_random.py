"""Discovery is right or undecided: random small networks, closed-form counts, and a twin for every protection."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
import random_nets
from noetherflow._model_function import ModelFunction
from noetherflow.discover import search
from noetherflow.discover.equations import NullSpace
from noetherflow.discover.search import RowScale, Search, Solution
from noetherflow.discover.spans import beyond
from random_nets import Net, chain, regression, squared_sum
from zoo import Call

DEEP = [2, 2, 2, 2, 2, 2]


def counts_of(discovery: nf.Discovery) -> tuple[int, int, int]:
    return len(discovery.symmetric), len(discovery.antisymmetric), discovery.others


def discover(net: Net) -> nf.Discovery:
    return nf.discover_generators(*net.built, progress=False)


def share_of_decided(seeds: range, most: int) -> float:
    """The share of random networks with a decision; every decision has to be right."""
    decided = 0
    for seed in seeds:
        net = random_nets.random_net(seed, most)
        discovery = nf.discover_generators(*net.built, generator=torch.Generator().manual_seed(seed), progress=False)
        decided += discovery.decided
        assert not discovery.decided or counts_of(discovery) == net.counts, (seed, net.name, counts_of(discovery))
        assert discovery.decided or discovery.note
    return decided / len(seeds)


def test_random_networks_are_right_or_undecided() -> None:
    assert share_of_decided(range(32), 24) > 0.85


@pytest.mark.slow
def test_two_hundred_random_networks_are_right_or_undecided() -> None:
    share = share_of_decided(range(1000, 1200), 40)
    print(f"{share:.1%} of 200 random networks are decided")
    assert share > 0.9


def relu(widths: list[int], *, bias: bool) -> Net:
    net = chain(widths, nn.ReLU, bias=bias)
    return regression(f"ReLU {widths}", net, widths[0], (sum(widths[1:-1]), 0, 0))


def rotary(*, buffer: bool = False) -> Net:
    """RoPE as a constant matrix: each plane of queries and keys has a scaling and a rotation."""
    net = random_nets.Scores(3, 4, random_nets.rotations(4, 4))
    if buffer:
        turns = net.turns
        del net.turns
        net.register_buffer("turns", turns)
    return regression("rotary", net, (4, 3), (2, 2, 0))


CLOSED: dict[str, Callable[[], Net]] = {
    "ReLU with biases": lambda: relu([2, 3, 2], bias=True),
    "ReLU without biases": lambda: relu([2, 3, 3, 2], bias=False),
    "deep narrow ReLU": lambda: relu(DEEP, bias=False),
    "deep narrow ReLU with biases": lambda: relu([2, 2, 2, 2, 2], bias=True),
    "very narrow ReLU": lambda: relu([1, 1, 1, 1, 1, 1], bias=False),
    "leaky ReLU": lambda: regression("", chain([1, 4, 1], nn.LeakyReLU, bias=False), 1, (4, 0, 0)),
    "linear chain": lambda: regression("", chain([2, 3, 2, 2], None, bias=False), 2, (9, 4, 0)),
    "linear chain with biases": lambda: regression("", chain([2, 3, 2], None, bias=True), 2, (6, 3, 0)),
    "boosts, h = 1": lambda: regression("", chain([1, 1, 1], None, bias=False), 1, (1, 0, 0)),
    "boosts, h = 4": lambda: regression("", chain([1, 4, 1], None, bias=False), 1, (16, 12, 0)),
    "hyperbolic": lambda: regression("", random_nets.Hyperbolic(4, gain=False), 4, (4, 0, 0)),
    "hyperbolic with a gain": lambda: regression("", random_nets.Hyperbolic(3, gain=True), 3, (6, 0, 0)),
    "tied factors": lambda: regression("", random_nets.Tied(3, 4), 3, (0, 6, 0)),
    "bilinear gate": lambda: regression("", random_nets.Gate((2, 3, 2), lambda x: x), 2, (6, 0, 0)),
    "ReLU gate": lambda: regression("", random_nets.Gate((2, 3, 2), torch.relu), 2, (6, 0, 0)),
    "tanh gate": lambda: regression("", random_nets.Gate((2, 3, 2), torch.tanh), 2, (3, 0, 0)),
    "scale invariance": lambda: regression("", random_nets.Direction(5), 5, (1, 0, 0)),
    "scores": lambda: regression("", random_nets.Scores(3, 3, None), (4, 3), (6, 3, 0)),
    "scores with rotary matrices": rotary,
    "a rare pair": lambda: random_nets.factors(4, 3, 2, 50),
    "a rare expert": lambda: random_nets.experts(3, 2, 2, 300),
}


@pytest.mark.parametrize("name", CLOSED)
def test_counts_are_those_of_mathematics(name: str) -> None:
    torch.manual_seed(0)
    net = CLOSED[name]()
    discovery = discover(net)
    assert discovery.decided, discovery.note
    assert counts_of(discovery) == net.counts
    assert not len(discovery.dead)


def test_a_narrow_network_that_is_almost_always_dead_is_undecided() -> None:
    discovery = discover(relu([2, *[1] * 12, 2], bias=False))
    assert not discovery.decided
    assert "random points had fewer" in discovery.note


def test_a_comparison_with_an_undecided_discovery_calls_nothing_missing_or_false() -> None:
    result = nf.check_completeness(*relu([2, *[1] * 12, 2], bias=False).built)
    assert (result.found, result.missing, result.false, result.complete) == (12, 0, 0, False)


@pytest.mark.parametrize("bias", [False, True])
def test_a_deep_narrow_network_misses_no_symmetry(bias: bool) -> None:
    net = relu(DEEP if not bias else DEEP[1:], bias=bias)
    result = nf.check_completeness(*net.built)
    assert (result.found, result.missing, result.false, result.complete) == (net.counts[0], 0, 0, True)


def test_rescalings_and_blocks_of_a_deep_narrow_network() -> None:
    net = relu(DEEP, bias=False)
    rescalings = nf.discover_rescalings(*net.built, progress=False)
    assert (rescalings.count, rescalings.decided) == (8, True)
    axes = [nf.Axis("0.weight", 0), nf.Axis("2.weight", 1)]
    blocks = nf.discover_blocks(*net.built, axes, progress=False)
    assert (blocks.count, len(blocks.antisymmetric[0]), blocks.others, blocks.decided) == (2, 0, 0, True)


def test_rescalings_and_blocks_of_a_rare_expert() -> None:
    net = random_nets.experts(3, 2, 2, 300)
    rescalings = nf.discover_rescalings(*net.built, progress=False)
    assert (rescalings.count, rescalings.decided) == (6, True)
    axes = [nf.Axis("a", 0), nf.Axis("b", 0)]
    blocks = nf.discover_blocks(*net.built, axes, progress=False)
    assert (blocks.count, len(blocks.antisymmetric[0]), blocks.others, blocks.decided) == (3, 0, 0, True)


# Twins: without a protection the result is wrong or undecided.


def test_without_the_test_at_fresh_points_a_rare_expert_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    net = random_nets.experts(3, 2, 2, 3000)
    monkeypatch.setattr(Search, "_confirm", lambda _, null, thresholds: Solution(null.vectors, null.gap))
    discovery = discover(net)
    assert discovery.decided
    assert counts_of(discovery) != net.counts


def test_if_rows_of_zeros_count_and_nothing_is_tested_a_deep_network_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def everything(_: RowScale, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300), torch.ones(len(rows), dtype=torch.bool)

    monkeypatch.setattr(RowScale, "select", everything)
    monkeypatch.setattr(Search, "_confirm", lambda _, null, thresholds: Solution(null.vectors, null.gap))
    monkeypatch.setattr("noetherflow.discover.generators.jump", lambda *_: "")
    net = relu(DEEP, bias=False)
    discovery = discover(net)
    assert discovery.decided
    assert counts_of(discovery) != net.counts


def test_without_repeated_examples_a_rare_expert_is_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    net = random_nets.experts(2, 1, 1, 2000)
    discovery = discover(net)
    assert (counts_of(discovery), discovery.decided) == (net.counts, True)
    monkeypatch.setattr(search._Evidence, "informative_examples", lambda *_: None)
    discovery = discover(net)
    assert not discovery.decided
    assert "fewer than 100 points" in discovery.note


def test_rows_of_zeros_and_of_rounding_do_not_count() -> None:
    scale = RowScale(0.0)
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-12, 0.0], [0.0, 2.0], [0.0, 4e-4]]).double()
    chosen, kept = scale.select(rows)
    assert kept.tolist() == [True, False, False, True, True]
    # The median length is 2; a row of less than 0.002 keeps its ratio to 0.002.
    torch.testing.assert_close(chosen, torch.tensor([[0.6, 0.8], [0.0, 1.0], [0.0, 0.2]]).double())
    assert not scale.select(torch.tensor([[1e-9, 0.0]]).double())[1].any()


def test_rows_of_rounding_alone_do_not_count() -> None:
    """Probabilities add up to one: the gradient of their sum is rounding, of about 1e-17."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Softmax(1))
    batch = torch.randn(6, 2), torch.randn(6, 1)
    discovery = nf.discover_generators(model, lambda model, batch: model(batch[0]).sum(1), batch, progress=False)
    assert not discovery.decided
    assert "random points had fewer" in discovery.note


class Stub:
    """Points of which a test chooses the rows: coefficients of two unknowns, and the example of each."""

    size, count, at_once, scale, note = 2, 3, 128, 1.0, ""
    precision, needs_every_example = torch.float64, True

    def __init__(self, rows: Callable[[int, Tensor], Tensor]) -> None:
        self.calls, self.rows = 0, rows

    def sample(self, count: int, scale: float = 1.0, examples: Tensor | None = None) -> Any:
        self.calls += 1
        chosen = torch.arange(count) % self.count
        rows = self.rows(self.calls, chosen).double()
        return search.Sample({"w": rows}, {"w": rows}, chosen, count)


def solve(rows: Callable[[int, Tensor], Tensor]) -> tuple[Solution, int]:
    points = Stub(rows)
    solution = Search(points, lambda _, gradients: gradients["w"], 2, "", False).run()  # type: ignore[arg-type]
    return solution, points.calls


def unit(chosen: Tensor, index: int) -> Tensor:
    return torch.eye(2)[torch.full_like(chosen, index)]


def test_a_row_that_appears_late_removes_a_solution() -> None:
    solution, calls = solve(lambda call, chosen: unit(chosen, int(call == 3)))
    assert (len(solution.vectors), solution.note) == (0, "")
    assert calls == 3
    kept, calls = solve(lambda call, chosen: unit(chosen, 0))
    assert (len(kept.vectors), kept.note) == (1, "")
    # The first rows, and fresh rows with parameters of five sizes.
    assert calls == 1 + len(search._SCALES)


def test_an_unknown_that_is_rarely_reached_needs_its_rows() -> None:
    """Only one example has a gradient, and an unknown appears in few rows of it: enough of them are awaited."""

    def rare(call: int, chosen: Tensor) -> Tensor:
        rows = torch.zeros(len(chosen), 3)
        rows[:, 0] = 1.0
        rows[0, 1:] = 1.0
        return rows if call > 1 else torch.eye(3)[:2].repeat(len(chosen), 1)[: len(chosen)]

    points = Stub(rare)
    solution = Search(points, lambda _, gradients: gradients["w"], 3, "", False).run()  # type: ignore[arg-type]
    # The last unknown has a coefficient in one row of a sample; the first of them removes the solution.
    assert (len(solution.vectors), points.calls) == (0, 2)
    points = Stub(lambda _, chosen: torch.ones(len(chosen), 2) * (torch.arange(len(chosen)) % 8 == 0)[:, None])
    points.needs_every_example = False
    solution = Search(points, lambda _, gradients: gradients["w"], 2, "", False).run()  # type: ignore[arg-type]
    assert (len(solution.vectors), solution.note) == (1, "")
    # 62 equations and 100 fresh rows, of 16 rows in a sample.
    assert points.calls == 5 + 7


def test_every_example_with_integers_of_its_own_is_tested() -> None:
    """Of 200 examples 128 are drawn, again and again."""
    points = Stub(lambda _, chosen: unit(chosen, 0))
    points.count = 200
    solution = Search(points, lambda _, gradients: gradients["w"], 2, "", False).run()  # type: ignore[arg-type]
    assert "an example is not tested" in solution.note
    points.needs_every_example = False
    solution = Search(points, lambda _, gradients: gradients["w"], 2, "", False).run()  # type: ignore[arg-type]
    assert (len(solution.vectors), solution.note) == (1, "")


def test_almost_solutions_at_fresh_points_are_undecided() -> None:
    def rows(call: int, chosen: Tensor) -> Tensor:
        return unit(chosen, 0).double() + (1e-10 if call > 1 else 0.0) * unit(chosen, 1).double()

    solution, _ = solve(rows)
    assert "too close to rounding" in solution.note


def test_a_direction_that_looked_dead_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    net = relu([2, 2, 2], bias=True)
    run = Search.run

    def wrong(self: Search) -> Solution:
        solution = run(self)
        if self.what == "directions":
            return Solution(torch.eye(self.unknowns, dtype=torch.float64)[3:5], solution.gap)
        return solution

    monkeypatch.setattr(Search, "run", wrong)
    discovery = discover(net)
    assert (counts_of(discovery), len(discovery.dead), discovery.decided) == (net.counts, 0, True)
    monkeypatch.setattr("noetherflow.discover.generators.refine", lambda vectors, *_: NullSpace(vectors, (0.0, 1.0)))
    assert len(discover(net).dead) == 2


# Buffers, inputs and parameters that are not drawn.


class Standardized(nn.Module):
    """out(relu((into x - mean) / sqrt(variance))), with the mean at zero now."""

    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)
        self.register_buffer("mean", torch.zeros(3), persistent=persistent)
        self.register_buffer("variance", torch.ones(3), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(((self.into(x) - self.mean) / self.variance.sqrt()).relu())


def test_buffers_of_the_state_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    moving = discover(regression("", Standardized(persistent=True), 2, (0, 0, 0)))
    assert (counts_of(moving), moving.decided, moving.note) == ((0, 0, 0), True, "")
    constant = discover(regression("", Standardized(persistent=False), 2, (3, 0, 0)))
    assert (counts_of(constant), constant.decided) == ((3, 0, 0), True)
    monkeypatch.setattr(ModelFunction, "with_state", lambda self, _: self)
    assert counts_of(discover(regression("", Standardized(persistent=True), 2, (0, 0, 0)))) == (3, 0, 0)


def test_batch_norm_in_eval_mode_keeps_its_symmetries() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 1)).eval()
    # Gain and bias of the norm against the columns of the last map.
    result = nf.check_completeness(*regression("", model, 2, (2, 0, 0)).built)
    assert (result.discovered, result.complete) == (2, True)


class Masked(nn.Module):
    """Scores with a causal mask in a buffer, either 0 and 1 or 0 and -inf."""

    def __init__(self, *, infinite: bool) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        ones = torch.ones(3, 3).tril()
        self.register_buffer("mask", ones.masked_fill(ones == 0, -torch.inf) if infinite else ones)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).mT
        masked = scores + self.mask if self.mask.isinf().any() else scores.masked_fill(self.mask == 0, -torch.inf)
        return masked.softmax(-1) @ x


@pytest.mark.parametrize("infinite", [False, True])
def test_masks_stay_as_they_are(infinite: bool) -> None:
    class Recorded(Masked):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.mask.detach())
            return super().forward(x)

    seen: list[Tensor] = []
    net = regression("", Recorded(infinite=infinite), (3, 2), (3, 1, 0))
    discovery = discover(net)
    assert (counts_of(discovery), discovery.decided) == (net.counts, True)
    assert all(torch.equal(mask.float(), seen[0].float()) for mask in seen)


def test_buffers_at_which_losses_are_not_finite_stay_and_the_note_says_so() -> None:
    class Rooted(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(*chain([2, 2, 2], nn.ReLU, bias=False))
            self.register_buffer("sizes", torch.arange(12.0))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.sizes.sqrt().sum()

    discovery = discover(regression("", Rooted(), 2, (2, 0, 0)))
    assert (counts_of(discovery), discovery.decided) == ((2, 0, 0), True)
    assert "buffers were not drawn" in discovery.note


def test_inputs_at_which_losses_are_not_finite_stay_and_the_note_says_so() -> None:
    net = chain([8, 1, 2], nn.ReLU, bias=False)
    batch = torch.rand(40, 8), torch.randn(40, 2)
    discovery = nf.discover_generators(
        net, lambda model, batch: (model(batch[0].log()) - batch[1]).square().sum(1), batch, progress=False
    )
    assert (counts_of(discovery), discovery.decided) == ((1, 0, 0), True)
    assert "inputs and buffers were not drawn" in discovery.note


def test_parameters_at_which_losses_are_not_finite_keep_their_signs_and_the_note_says_so() -> None:
    class Logarithms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.rand(4) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.a.log() + self.b.log())[:, None]

    discovery = discover(regression("", Logarithms(), 4, (4, 0, 0)))
    assert (counts_of(discovery), discovery.decided) == ((4, 0, 0), True)
    assert "parameters keep their signs" in discovery.note


# Types of numbers, and models with mistakes.


class Planes(nn.Module):
    """A complex parameter beside a real one."""

    def __init__(self) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.randn(2, 2, dtype=torch.complex64))
        self.w = nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w((x.to(self.z.dtype) @ self.z).real)


@pytest.mark.parametrize("function", [nf.discover_generators, nf.discover_rescalings])
def test_complex_parameters_are_refused_unless_frozen(function: Any) -> None:
    net = regression("", Planes(), 2, (0, 0, 0))
    with pytest.raises(nf.SettingsError, match=r"\['z'\] are complex.*two real parameters"):
        function(*net.built, progress=False)
    net.model.z.requires_grad_(False)
    result = function(*net.built, progress=False)
    assert (result.decided, result.note) == (True, "")


def test_frozen_integers_stay_integers() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = nn.Parameter(torch.tensor([3, 1], dtype=torch.uint8), requires_grad=False)
            self.net = chain([2, 2, 2], nn.ReLU, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x * (self.packed & 1))

    net = regression("", Packed(), 2, (2, 0, 0))
    discovery = discover(net)
    assert (counts_of(discovery), discovery.decided) == (net.counts, True)


def test_a_model_that_needs_float32_is_searched_in_float32() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = chain([2, 2, 2], nn.ReLU, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x @ torch.eye(2))

    net = regression("", Single(), 2, (2, 0, 0))
    discovery = discover(net)
    assert (counts_of(discovery), discovery.decided) == (net.counts, True)


@pytest.mark.parametrize("function", [nf.discover_generators, nf.discover_rescalings])
def test_a_model_that_fails_is_refused_in_a_sentence(function: Any) -> None:
    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.equal(x, given):
                raise TypeError("only the examples of yesterday, please\nand nothing else")
            return super().forward(x)

    given = torch.randn(3, 2)
    with pytest.raises(nf.LossError, match=r"^loss.* fails .*: TypeError: only the examples of yesterday, please$"):
        function(Broken(2, 2), squared_sum, (given.double() + 1, torch.zeros(3, 2)), progress=False)


def test_a_loss_that_jumps_leaves_the_search_undecided() -> None:
    """Every gradient allows scalings of the hidden units, but a unit that passes 1 changes its slope."""
    jumps = Call(lambda x: torch.where(x > 1, x, 0.1 * x))
    model = nn.Sequential(nn.Linear(2, 2, bias=False), jumps, nn.Linear(2, 2, bias=False))
    net = regression("", model, 2, (0, 0, 0))
    axes = [nf.Axis("0.weight", 0), nf.Axis("2.weight", 1)]
    results = [
        discover(net),
        nf.discover_rescalings(*net.built, progress=False),
        nf.discover_blocks(*net.built, axes, progress=False),
    ]
    for result in results:
        assert not result.decided
        assert "the loss jumps" in result.note


def count(result: Any) -> int:
    return len(result.symmetric) if isinstance(result, nf.Discovery) else result.count


@pytest.mark.parametrize("limit", [6.0, 30.0])
def test_a_clamp_far_out_is_seen(limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Hardtanh(-limit, limit), nn.Linear(3, 2, bias=False))
    net = regression("", model, 2, (0, 0, 0))
    discovery = discover(net)
    assert (counts_of(discovery), discovery.decided) == (net.counts, True)
    monkeypatch.setattr(search, "_SCALES", (0.03,))
    if limit == 30.0:
        assert counts_of(discover(net)) == (6, 3, 0)


def test_dropout_drops_other_units_at_other_points() -> None:
    layers = [nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Dropout(0.5), nn.Linear(3, 2, bias=False)]
    net = regression("", nn.Sequential(*layers).train(), 2, (3, 0, 0))
    discovery = discover(net)
    assert (counts_of(discovery), len(discovery.dead), discovery.decided) == (net.counts, 0, True)


def test_targets_that_a_loss_refuses_are_those_of_the_batch() -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        outputs = model(batch[0]).sigmoid()
        return nn.functional.binary_cross_entropy(outputs, batch[1], reduction="none").mean(1)

    batch = torch.randn(30, 2), torch.rand(30, 2)
    discovery = nf.discover_generators(chain([2, 3, 2], nn.ReLU, bias=False), loss, batch, progress=False)
    assert (counts_of(discovery), discovery.decided) == ((3, 0, 0), True)
    assert "inputs and buffers were not drawn" in discovery.note


# What is beyond the symmetries of the finder.


@pytest.mark.parametrize(
    ("name", "expected"),
    [("hyperbolic", 4), ("scores with rotary matrices", 1), ("ReLU with biases", 0), ("linear chain", 0)],
)
def test_generators_beyond_the_finder(name: str, expected: int) -> None:
    """The finder scales all queries against all keys; a scaling of a single plane is not along axes."""
    torch.manual_seed(0)
    net = CLOSED[name]()
    discovery = discover(net)
    symmetries = list(nf.find_symmetries(*net.built).values())
    rest = beyond(discovery, symmetries, net.model)
    assert len(rest) == expected
    flat = rest.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(expected, dtype=torch.float64))
    known = nf.verify_symmetry
    for generator in rest:
        assert known(*net.built, nf.DenseSymmetry(generator, discovery.names)) < 1e-9


def test_boosts_are_beyond_a_matrix_symmetry() -> None:
    """Of the h^2 symmetric generators of u . w, h (h + 1) / 2 are scalings of u against w along the hidden axis."""
    net = CLOSED["boosts, h = 4"]()
    discovery = discover(net)
    matrix = nf.MatrixSymmetry([nf.Axis("0.weight", 0)], [nf.Axis("1.weight", 1)])
    assert len(beyond(discovery, [], net.model)) == 16
    assert len(beyond(discovery, [matrix], net.model)) == 6
    assert len(beyond(discovery, [matrix], dict(net.model.named_parameters()))) == 6


def test_a_discovery_can_be_pickled_and_leaves_random_numbers_alone() -> None:
    net = relu([2, 2, 2], bias=True)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    discovery = discover(net)
    assert torch.equal(torch.rand(3), expected)
    copied = pickle.loads(pickle.dumps(discovery))
    assert torch.equal(copied.symmetric, discovery.symmetric)
    assert (copied.note, copied.decided) == (discovery.note, True)
