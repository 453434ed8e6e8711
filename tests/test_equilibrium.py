"""The equilibrium against brute force, against a fresh measurement after the move, and where there is none."""

import math

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import checks
import noetherflow as nf
from cases import Case, case, cases, mlp, rescaling, squared_error
from noetherflow._forces import forces
from noetherflow._minibatch import minibatches

Decay = float | dict[str, float]
ONE_SIDED = "scalar, plus only"
GENERATOR = "dense, eigenvalues 1 and -2"
EVERY = [(one, wd) for one in cases() for wd in (0.0, 0.02, one.decays)]
ALL = [(one, wd) for one, wd in EVERY if one.name != ONE_SIDED or wd]
EVERY_ID, IDS = (
    [f"{one}, weight decay {'by parameter' if isinstance(wd, dict) else wd}" for one, wd in pairs]
    for pairs in (EVERY, ALL)
)


@pytest.mark.parametrize(("one", "weight_decay"), EVERY, ids=EVERY_ID)
def test_the_potential_is_what_it_says(one: Case, weight_decay: Decay) -> None:
    checks.potential_matches_definition(one, weight_decay)


@pytest.mark.parametrize(("one", "weight_decay"), ALL, ids=IDS)
def test_the_equilibrium_is_the_minimum_that_scipy_finds(one: Case, weight_decay: Decay) -> None:
    checks.equilibrium_matches_scipy(one, weight_decay)


@pytest.mark.parametrize(("one", "weight_decay"), ALL, ids=IDS)
def test_no_drift_is_left_when_measured_anew(one: Case, weight_decay: Decay) -> None:
    checks.no_drift_after_rebalance(case(one.name), weight_decay)


@pytest.mark.parametrize(("one", "weight_decay"), ALL, ids=IDS)
def test_the_drift_is_minus_the_slope_of_the_potential(one: Case, weight_decay: Decay) -> None:
    sgd, noise = nf.SGD(0.1, 5, weight_decay), checks.noise_of(one)
    rates = nf.drift(noise, sgd, one.model)
    step = 1e-5
    for name, symmetry in one.symmetries.items():
        for basis in checks.along(symmetry, one.model):
            ahead = nf.potential(noise, sgd, one.model, {name: step * basis})
            behind = nf.potential(noise, sgd, one.model, {name: -step * basis})
            slope = (ahead - behind) / (2 * step)
            torch.testing.assert_close(-(rates[name] * basis).sum(), slope, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("one", "weight_decay"), ALL, ids=IDS)
def test_the_relaxation_time_is_that_of_the_flow(one: Case, weight_decay: Decay) -> None:
    """A small departure of one coordinate, the others held, shrinks at the ratio of two finite differences."""
    sgd = nf.SGD(0.1, 5, weight_decay)
    equilibrium = nf.solve_equilibrium(checks.noise_of(one), sgd, one.model)
    nf.rebalance_(one.model, equilibrium, one.loss, one.batch)
    noise = checks.noise_of(one)
    step = 1e-4
    for name, symmetry in equilibrium.symmetries.items():
        rates = []
        for basis in checks.along(symmetry, one.model):
            moved = symmetry.act(step * basis, dict(equilibrium.params))
            charge = symmetry.charge(moved) - symmetry.charge(equilibrium.params)
            ahead = nf.potential(noise, sgd, equilibrium.params, {name: step * basis})
            behind = nf.potential(noise, sgd, equilibrium.params, {name: -step * basis})
            here = nf.potential(noise, sgd, equilibrium.params)
            curvature = (ahead + behind - 2 * here) / step**2
            rates.append((curvature * step / (charge * basis).sum()).item())
        found = equilibrium.relaxation_steps[name] * sgd.lr
        if isinstance(symmetry, nf.MatrixSymmetry):
            # The slowest direction is no slower than the slowest of these and no faster than any.
            assert found * min(rates) >= 1 - 1e-3
        else:
            torch.testing.assert_close(1 / found.reshape(-1), torch.tensor(rates).double(), rtol=1e-3, atol=0)


def test_relaxation_of_a_rotation_against_its_linearised_flow() -> None:
    one = case("matrix")
    sgd = nf.SGD(0.1, 5, 0.02)
    equilibrium = nf.solve_equilibrium(checks.noise_of(one), sgd, one.model)
    nf.rebalance_(one.model, equilibrium, one.loss, one.batch)
    noise = checks.noise_of(one)
    start = {n: p.detach().clone() for n, p in one.model.named_parameters()}
    symmetry = one.symmetries["rotation"]
    push, pull = forces("rotation", start, minibatches(noise, sgd))
    # The slowest departure is along one direction of the hidden units.
    squares = symmetry.grams(start)
    slowest = torch.from_numpy(scipy.linalg.eigh(push + pull, squares.plus + squares.minus)[1][:, 0])
    shift = 1e-4 * torch.outer(slowest, slowest) / slowest.square().sum()
    moved = symmetry.act(shift, start)
    carried = nf.NoiseMoments(
        1, noise.mean, {"rotation": _carried(noise.grams["rotation"], shift)}, {}, noise.trace, {}, noise.symmetries
    )
    steps = int(4 * equilibrium.relaxation_steps["rotation"])
    flow = nf.simulate(
        one.model,
        one.loss,
        one.batch,
        nf.NoetherFlow(sgd, dt=sgd.lr, noise=carried),
        steps=steps,
        start={name: tensor.unsqueeze(0) for name, tensor in moved.items()},
        symmetries=one.symmetries,
    )
    gap = torch.linalg.norm((flow.charges["rotation"][:, 0] - symmetry.charge(start)).flatten(1), dim=1)
    times = flow.steps - flow.steps.double().mean()
    rate = -(times @ gap.log()) / (times @ times)
    torch.testing.assert_close(1 / rate, equilibrium.relaxation_steps["rotation"], rtol=1e-3, atol=0)


def _carried(grams: nf.Grams, x: Tensor) -> nf.Grams:
    grow, shrink = torch.linalg.matrix_exp(x), torch.linalg.matrix_exp(-x)
    return nf.Grams(shrink @ grams.plus @ shrink, grow @ grams.minus @ grow)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(-8, 8), min_size=16, max_size=16), st.sampled_from([0.0, 1e-6, 1e-2]))
def test_newton_forgets_a_badly_scaled_start(exponents: list[float], weight_decay: float) -> None:
    """From anywhere on the orbit, scaled by factors up to e^8 per neuron, the same point is reached."""
    one = case("diagonal, coupled layers")
    sgd = nf.SGD(0.1, 5, weight_decay)
    home = nf.solve_equilibrium(checks.noise_of(one), sgd, one.model)
    theta, x = one.params, torch.tensor(exponents).double()
    for name, part in zip(one.symmetries, x.split([6, 4, 6]), strict=True):
        theta = one.symmetries[name].act(part, theta)
    with torch.no_grad():
        for name, parameter in one.model.named_parameters():
            parameter.copy_(theta[name])
    found = nf.solve_equilibrium(checks.noise_of(one), sgd, one.model)
    assert found.status is nf.Status.CONVERGED
    assert found.iterations <= 15
    torch.testing.assert_close(found.params, home.params, rtol=1e-7, atol=1e-9)


def test_one_symmetry_alone_is_the_closed_form() -> None:
    one = case("diagonal")
    sgd, noise = nf.SGD(0.1, 4, 0.03), checks.noise_of(one)
    grams, theta = noise.grams["hidden"], one.params
    p, m = one.symmetries["hidden"].grams(theta)
    push = 4 * 0.015 * m + 0.1 / 4 * grams.plus
    pull = 4 * 0.015 * p + 0.1 / 4 * grams.minus
    found = nf.solve_equilibrium(noise, sgd, one.model).coordinates["hidden"]
    torch.testing.assert_close(found, torch.log(push / pull) / 4, rtol=1e-11, atol=1e-12)


def test_the_fourth_power_law_of_a_scale_invariant_weight() -> None:
    one = case(ONE_SIDED)
    lr, size, weight_decay = 0.1, 4, 0.03
    noise = checks.noise_of(one)
    equilibrium = nf.solve_equilibrium(noise, nf.SGD(lr, size, weight_decay), one.model)
    invariant = one.params["weight"].square().sum() * noise.trace
    expected = lr * invariant / (2 * weight_decay * size)
    torch.testing.assert_close(equilibrium.params["weight"].square().sum() ** 2, expected)


def test_layer_by_layer_is_not_the_joint_solution() -> None:
    one = case("diagonal, coupled layers")
    sgd, noise = nf.SGD(0.1, 5), checks.noise_of(one)
    joint = nf.solve_equilibrium(noise, sgd, one.model)
    alone = {
        name: nf.solve_equilibrium(noise.select(name), sgd, one.model).coordinates[name] for name in one.symmetries
    }
    assert max((joint.coordinates[name] - alone[name]).abs().max() for name in alone) > 1e-2


# Where there is no equilibrium.


def network_with(dead: tuple[int, ...] = (), mute: tuple[int, ...] = ()) -> Case:
    """The diagonal case with neurons that never fire, and neurons that nobody listens to."""
    one = case("diagonal")
    with torch.no_grad():
        for row in dead:
            one.model[0].weight[row] = 0.0
            one.model[0].bias[row] = -1.0
        for row in mute:
            one.model[2].weight[:, row] = 0.0
    return one


def solve(one: Case, weight_decay: float = 0.0) -> nf.Equilibrium:
    return nf.solve_equilibrium(checks.noise_of(one), nf.SGD(0.1, 5, weight_decay), one.model)


def test_a_dead_neuron_is_left_where_it_is() -> None:
    one = network_with(dead=(1, 3))
    equilibrium = solve(one)
    outcome = equilibrium.outcomes["hidden"]
    assert outcome.status is nf.Status.SINGULAR
    assert outcome.directions == (1, 3)
    assert "1, 3" in outcome.message
    assert "dead" in outcome.message
    x = equilibrium.coordinates["hidden"]
    assert x[1] == x[3] == 0.0
    assert (x[[0, 2, 4]] != 0).all()
    assert equilibrium.relaxation_steps["hidden"][1] == torch.inf
    assert equilibrium.drift["hidden"].abs().max() < 1e-12
    nf.rebalance_(one.model, equilibrium, one.loss, one.batch)


def test_a_dead_neuron_under_weight_decay_shrinks_for_ever_or_balances() -> None:
    """Bias -1 and outgoing weights both decay: balanced norms, by weight decay alone."""
    one = network_with(dead=(1,))
    equilibrium = solve(one, 0.01)
    assert equilibrium.status is nf.Status.CONVERGED
    row = equilibrium.params["0.bias"][1].square() + equilibrium.params["0.weight"][1].square().sum()
    torch.testing.assert_close(row, equilibrium.params["2.weight"][:, 1].square().sum())


def test_a_nearly_dead_neuron_is_solved_like_any_other() -> None:
    one = case("diagonal")
    with torch.no_grad():
        one.model[0].weight[2] *= 1e-7
        one.model[0].bias[2] = 1e-9
        one.model[2].weight[:, 2] *= 1e-7
    before = nf.drift(checks.noise_of(one), nf.SGD(0.1, 5), one.model)["hidden"]
    nf.rebalance_(one.model, solve(one), one.loss, one.batch)
    after = nf.drift(checks.noise_of(one), nf.SGD(0.1, 5), one.model)["hidden"]
    assert (after.abs() <= 1e-9 * before.abs()).all()


def test_a_neuron_that_nobody_listens_to_grows_for_ever() -> None:
    equilibrium = solve(network_with(mute=(2,)))
    outcome = equilibrium.outcomes["hidden"]
    assert outcome.status is nf.Status.AT_INFINITY
    assert outcome.directions == (2,)
    assert equilibrium.coordinates["hidden"][2] == 0.0


def test_growing_for_ever_is_said_of_the_right_side() -> None:
    # Nothing comes back through outgoing weights of zero, so only they have noise: the minus side grows.
    assert "shrinking" in solve(network_with(mute=(2,))).outcomes["hidden"].message
    one = case(ONE_SIDED)
    assert "growing" in solve(one).outcomes["length"].message


def test_the_status_of_several_symmetries_is_the_worst() -> None:
    """A dead row in one of two layers that do not meet."""
    torch.manual_seed(0)
    net = mlp(4, 5, 5, 5, 3, activation=nn.LeakyReLU).double()
    with torch.no_grad():
        net[0].weight[1] = net[0].bias[1] = 0.0
        net[2].weight[:, 1] = 0.0
    one = case("diagonal")
    symmetries = {"first": rescaling(0), "last": rescaling(4)}
    noise = nf.estimate_noise(net, one.loss, one.loader(), symmetries)
    equilibrium = nf.solve_equilibrium(noise, nf.SGD(0.1, 5), net)
    endings = {name: outcome.status for name, outcome in equilibrium.outcomes.items()}
    assert endings == {"first": nf.Status.SINGULAR, "last": nf.Status.CONVERGED}
    assert equilibrium.status is nf.Status.SINGULAR
    assert equilibrium.message.startswith("first: rows 1 carry neither")
    assert [status.severity for status in nf.Status] == [0, 1, 2, 3, 4, 5, 6]


def test_throw_turns_a_status_into_an_error() -> None:
    one = network_with(dead=(1,))
    with pytest.raises(nf.EquilibriumError, match="dead"):
        nf.solve_equilibrium(checks.noise_of(one), nf.SGD(0.1, 5), one.model, throw=True)


def test_a_fresh_lora_has_no_equilibrium_and_is_not_collapsed() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)).double()
    nn.init.zeros_(net[1].weight)
    one = case("matrix")
    rotation = {"rank": nf.MatrixSymmetry(nf.Axis("0.weight", 0), nf.Axis("1.weight", 1))}
    for weight_decay in (0.0, 0.1):
        noise = nf.estimate_noise(net, one.loss, one.loader(), rotation)
        equilibrium = nf.solve_equilibrium(noise, nf.SGD(0.1, 5, weight_decay), net)
        assert equilibrium.outcomes["rank"].status is nf.Status.DEGENERATE
        assert "1.weight" in equilibrium.message
        assert "LoRA" in equilibrium.message
        assert not equilibrium.coordinates["rank"].any()
        nf.rebalance_(net, equilibrium, one.loss, one.batch)
        assert net[0].weight.abs().max() > 0.1


def test_fewer_outputs_than_hidden_units_leave_directions_without_noise() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    x, y = torch.randn(40, 6).double(), torch.randn(40, 2).double()
    rotation = {"hidden": nf.MatrixSymmetry(nf.Axis("0.weight", 0), nf.Axis("1.weight", 1))}
    noise = nf.estimate_noise(net, squared_error, [(x, y)], rotation)
    equilibrium = nf.solve_equilibrium(noise, nf.SGD(0.1, 5), net)
    outcome = equilibrium.outcomes["hidden"]
    assert outcome.status is nf.Status.AT_INFINITY
    assert len(outcome.directions) == 2
    assert "2 directions" in outcome.message
    losses = squared_error(net, (x, y))
    nf.rebalance_(net, equilibrium, squared_error, (x, y))
    torch.testing.assert_close(squared_error(net, (x, y)), losses)
    # Weight decay cannot help: what feeds the spare directions only shrinks, and nothing comes back.
    decayed = nf.solve_equilibrium(noise, nf.SGD(0.1, 5, 0.01), net).outcomes["hidden"]
    assert decayed.status is nf.Status.AT_INFINITY
    assert "2 directions have nothing that keeps the plus side from shrinking" in decayed.message


def test_a_generator_with_one_sign_has_no_equilibrium_without_weight_decay() -> None:
    one = case(ONE_SIDED)
    generator = {"length": nf.DenseSymmetry(torch.eye(8), names="weight")}
    noise = checks.noise_of(one, generator)
    outcome = nf.solve_equilibrium(noise, nf.SGD(0.1, 5), one.model).outcomes["length"]
    assert outcome.status is nf.Status.AT_INFINITY
    assert "growing" in outcome.message
    found = nf.solve_equilibrium(noise, nf.SGD(0.1, 5, 0.1), one.model).coordinates["length"]
    expected = nf.solve_equilibrium(checks.noise_of(one), nf.SGD(0.1, 5, 0.1), one.model)
    torch.testing.assert_close(found, expected.coordinates["length"])


def rotation_with(plus: list[float], minus: list[float]) -> tuple[Tensor, nf.Equilibrium, nf.NoiseMoments, nf.Params]:
    """Four hidden units whose noise is diagonal in a basis drawn at random, the basis first."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    params = {
        "a": torch.randn(4, 3, generator=generator).double(),
        "b": torch.randn(5, 4, generator=generator).double(),
    }
    sides = nf.Grams(*((basis * torch.tensor(side).double()) @ basis.mT for side in (plus, minus)))
    noise = nf.NoiseMoments(
        count=1,
        mean={name: torch.zeros_like(tensor) for name, tensor in params.items()},
        scatter={"hidden": sides},
        square_scatter={},
        total_scatter=sides.plus.trace() + sides.minus.trace(),
        spreads={},
        symmetries={"hidden": nf.MatrixSymmetry(nf.Axis("a", 0), nf.Axis("b", 1))},
    )
    return basis, nf.solve_equilibrium(noise, nf.SGD(0.1, 5), params), noise, params


def test_directions_of_a_rotation_each_have_an_ending_of_their_own() -> None:
    basis, equilibrium, noise, params = rotation_with([1.0, 2.0, 0.0, 0.0], [3.0, 0.0, 4.0, 0.0])
    outcome = equilibrium.outcomes["hidden"]
    assert (outcome.status, len(outcome.directions)) == (nf.Status.AT_INFINITY, 3)
    assert "1 directions carry neither gradient noise nor weight decay" in outcome.message
    assert "1 directions have nothing that keeps the plus side from growing for ever" in outcome.message
    assert "1 directions have nothing that keeps the plus side from shrinking to zero" in outcome.message
    x, drift = (basis.mT @ found["hidden"] @ basis for found in (equilibrium.coordinates, equilibrium.drift))
    # e^{4x} = P / R where both are there; where they are not, all that is left is the noise's own drift, 2 sigma^2 N.
    expected = torch.diag(torch.tensor([-math.log(3) / 4, 0.0, 0.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)
    left = torch.diag(torch.tensor([0.0, 0.02 * 2, -0.02 * 4, 0.0], dtype=torch.float64))
    torch.testing.assert_close(drift, left, rtol=1e-9, atol=1e-12)
    before = nf.drift(noise, nf.SGD(0.1, 5), params)["hidden"]
    torch.testing.assert_close(
        basis.mT @ before @ basis, left + torch.diag(torch.tensor([-0.02 * 2, 0.0, 0.0, 0.0], dtype=torch.float64))
    )
    # 1 e^{-2x} + 3 e^{2x} = 2 sqrt(3)
    assert equilibrium.trace_after == pytest.approx(2 * 3**0.5 + 6)
    assert equilibrium.relaxation_steps["hidden"] == torch.inf


GROW, SHRINK = (f"directions have nothing that keeps the plus side from {way}" for way in ("growing", "shrinking"))


@pytest.mark.parametrize(
    ("plus", "minus", "status", "words"),
    [
        ([1.0, 1.0, 0.0, 0.0], [1.0, 2.0, 0.0, 0.0], nf.Status.SINGULAR, "2 directions carry neither"),
        ([1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0], nf.Status.AT_INFINITY, f"2 {GROW}"),
        ([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 2.0, 3.0], nf.Status.AT_INFINITY, f"3 {SHRINK}"),
        ([0.0] * 4, [0.0] * 4, nf.Status.SINGULAR, "4 directions carry neither"),
    ],
)
def test_directions_without_an_equilibrium_are_counted(
    plus: list[float], minus: list[float], status: nf.Status, words: str
) -> None:
    _, equilibrium, _, _ = rotation_with(plus, minus)
    outcome = equilibrium.outcomes["hidden"]
    assert outcome.status is status
    assert outcome.message.startswith(words)
    assert len(outcome.directions) == int(words[0])
    assert sum(what in outcome.message for what in ("carry neither", GROW, SHRINK)) == 1


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_ending_of_a_generator_with_one_sign(sign: float) -> None:
    """By noise alone, by decay alone, by both and by neither; what is left of the drift is the drift."""
    one = case(ONE_SIDED)
    generator = {"length": nf.DenseSymmetry(sign * torch.eye(8), names="weight")}
    noise, still = (
        nf.estimate_noise(one.model, lambda model, batch: factor * one.loss(model, batch), one.loader(), generator)  # noqa: B023
        for factor in (1.0, 0.0)
    )
    up, down = ("growing", "falling") if sign > 0 else ("falling", "growing")
    for moments, decay, word in ((noise, 0.0, up), (still, 0.1, down)):
        equilibrium = nf.solve_equilibrium(moments, nf.SGD(0.1, 5, decay), one.model)
        outcome = equilibrium.outcomes["length"]
        assert (outcome.status, outcome.directions) == (nf.Status.AT_INFINITY, (0,))
        assert f"nothing keeps the coordinate from {word} for ever" in outcome.message
        assert equilibrium.coordinates["length"] == 0
        assert equilibrium.relaxation_steps["length"] == torch.inf
        rate = nf.drift(moments, nf.SGD(0.1, 5, decay), one.model)["length"]
        torch.testing.assert_close(equilibrium.drift["length"], rate)
    neither = nf.solve_equilibrium(still, nf.SGD(0.1, 5), one.model).outcomes["length"]
    assert (neither.status, neither.directions) == (nf.Status.SINGULAR, (0,))
    both = nf.solve_equilibrium(noise, nf.SGD(0.1, 5, 0.1), one.model)
    expected = nf.solve_equilibrium(checks.noise_of(one), nf.SGD(0.1, 5, 0.1), one.model)
    torch.testing.assert_close(both.coordinates["length"], sign * expected.coordinates["length"])
    torch.testing.assert_close(both.relaxation_steps["length"], expected.relaxation_steps["length"])


def test_a_root_that_is_far_away_is_found_in_few_steps() -> None:
    sgd, steps = nf.SGD(0.1, 5, 0.02), []
    home = nf.solve_equilibrium(checks.noise_of(case(GENERATOR)), sgd, case(GENERATOR).model)
    for far in (0.0, 3.0, -3.0, 9.0, -9.0):
        one = case(GENERATOR)
        theta = one.symmetries["neuron"].act(torch.tensor(far).double(), one.params)
        with torch.no_grad():
            for name, parameter in one.model.named_parameters():
                parameter.copy_(theta[name])
        found = nf.solve_equilibrium(checks.noise_of(one), sgd, one.model)
        assert found.status is nf.Status.CONVERGED
        torch.testing.assert_close(found.coordinates["neuron"], home.coordinates["neuron"] - far, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.params, home.params, rtol=1e-8, atol=1e-10)
        steps.append(found.iterations)
    # By Newton's method; where rounding keeps it from the last digit, bisection takes some fifty steps.
    assert min(steps) >= 1
    assert sorted(steps)[2] <= 16, steps
    assert max(steps) <= 100, steps


@pytest.mark.parametrize("name", ["diagonal", "matrix", "dense, eigenvalues 1 and -2"])
def test_noise_that_is_not_finite_is_a_status(name: str) -> None:
    one = case(name)
    noise = checks.noise_of(one)
    for tensor in noise.square_scatter.values():
        tensor.fill_(torch.nan)
    for sides in noise.scatter.values():
        sides.plus.fill_(torch.nan)
    equilibrium = nf.solve_equilibrium(noise, nf.SGD(0.1, 5), one.model)
    assert equilibrium.status is nf.Status.NON_FINITE
    with pytest.raises(nf.EquilibriumError, match="no equilibrium to move to"):
        nf.rebalance_(one.model, equilibrium, one.loss, one.batch)


def test_rotations_that_share_a_tensor_are_refused() -> None:
    net = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3))).double()
    rotations = {f"{k}": nf.MatrixSymmetry(nf.Axis(f"{k}.weight", 0), nf.Axis(f"{k + 1}.weight", 1)) for k in range(2)}
    x = torch.randn(20, 3).double()
    noise = nf.estimate_noise(net, squared_error, [(x, x)], rotations)
    with pytest.raises(nf.EquilibriumError, match="equilibrate"):
        nf.solve_equilibrium(noise, nf.SGD(0.1, 5), net)
    alone = nf.solve_equilibrium(noise.select("0"), nf.SGD(0.1, 5), net)
    assert alone.status is nf.Status.CONVERGED


def test_no_symmetry_at_all_is_refused() -> None:
    one = case("diagonal")
    with pytest.raises(nf.EquilibriumError, match="measured for none"):
        nf.solve_equilibrium(checks.noise_of(one).select(), nf.SGD(0.1, 5), one.model)


def test_an_equilibrium_of_a_wide_layer_keeps_neurons_apart() -> None:
    """Each neuron has its own solution: one that has a thousand times the noise does not blur the others."""
    net = mlp(4, 50, 3).double()
    with torch.no_grad():
        net[0].weight[0] *= 1e3
    one = case("diagonal")
    symmetries = {"hidden": rescaling(0)}
    sgd, noise = nf.SGD(0.1, 5), nf.estimate_noise(net, one.loss, one.loader(), symmetries)
    before = nf.drift(noise, sgd, net)["hidden"]
    nf.rebalance_(net, nf.solve_equilibrium(noise, sgd, net), one.loss, one.batch)
    after = nf.drift(nf.estimate_noise(net, one.loss, one.loader(), symmetries), sgd, net)["hidden"]
    alive = before != 0
    assert (after.abs()[alive] <= 1e-9 * before.abs()[alive]).all()
