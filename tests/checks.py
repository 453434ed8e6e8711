"""Checks that the tests make and that planted faults must fail: plain functions that raise AssertionError."""

import copy
import dataclasses
from typing import Any

import scipy.optimize
import torch
from torch import Tensor, nn

import noetherflow as nf
import oracles
from cases import Case
from noetherflow import _spd

TIGHT = {"rtol": 1e-9, "atol": 1e-12}


def noise_of(
    case: Case, symmetries: dict[str, nf.Symmetry] | None = None, *, one_batch: bool = False
) -> nf.NoiseMoments:
    """The moments of a case's data set, in several batches or in one."""
    loader = [case.batch] if one_batch else case.loader()
    return nf.estimate_noise(case.model, case.loss, loader, symmetries or case.symmetries)


def along(symmetry: nf.Symmetry, model: nn.Module) -> list[Tensor]:
    """A basis of the algebra."""
    params = dict(model.named_parameters(remove_duplicate=False))
    return oracles.coordinates(symmetry, params)


def noise_is(noise: nf.NoiseMoments, expected: oracles.Statistics, rtol: float = 1e-9) -> None:
    """Every statistic on both sides, relative to the size of what it is a part of."""
    whole = expected.trace.item()
    close = {"rtol": rtol, "atol": rtol * whole}
    assert noise.count == expected.count
    torch.testing.assert_close(noise.trace, expected.trace, rtol=rtol, atol=0)
    assert noise.grams.keys() == expected.grams.keys()
    for name, sides in expected.grams.items():
        torch.testing.assert_close(noise.grams[name].plus, sides.plus, **close)
        torch.testing.assert_close(noise.grams[name].minus, sides.minus, **close)
        # The difference of large numbers: what is lost in it is relative to these.
        loss = {"rtol": rtol**0.5, "atol": rtol**0.5 * whole, "equal_nan": True}
        for found, error in zip(noise.standard_errors[name], expected.errors[name], strict=True):
            torch.testing.assert_close(found, error, **loss)
    for name, variance in noise.variance.items():
        torch.testing.assert_close(variance, expected.variance[name], **close)


def moments_match_covariance(case: Case) -> None:
    """N_+ - N_- along every generator is Tr[Sigma Q], with Sigma from a loop and Q built entry by entry."""
    noise = noise_of(case)
    mean, sigma = oracles.covariance(case.model, case.loss, case.batch)
    torch.testing.assert_close(oracles.flat(noise.mean), mean, **TIGHT)
    torch.testing.assert_close(noise.trace, sigma.trace(), **TIGHT)
    stack = oracles.stacked(case.model, case.loss, case.batch)
    noise_is(noise_of(case, one_batch=True), oracles.statistics(case.model, stack, case.symmetries))
    for name, symmetry in case.symmetries.items():
        net = symmetry.charge_of(noise.grams[name])
        for x in along(symmetry, case.model):
            expected = (sigma * oracles.generator(symmetry, case.model, x)).sum()
            torch.testing.assert_close(oracles.pairing(net, x), expected, **TIGHT)


def decay_of(weight_decay: float | dict[str, float], name: str) -> float:
    """The weight decay of a parameter, as `torch.optim.SGD` has it."""
    return weight_decay[name] if isinstance(weight_decay, dict) else weight_decay


def decay_vector(case: Case, weight_decay: float | dict[str, float]) -> Tensor:
    """The weight decay of every entry, on all parameters flattened."""
    full = {name: torch.full_like(p, decay_of(weight_decay, name)) for name, p in case.params.items()}
    return oracles.flat(full)


def groups_of(model: nn.Module, weight_decay: float | dict[str, float]) -> list[dict[str, Any]]:
    """A parameter group of `torch.optim.SGD` for each parameter."""
    return [{"params": [p], "weight_decay": decay_of(weight_decay, name)} for name, p in model.named_parameters()]


def mean_move(case: Case, sgd: nf.SGD, count: int, *, replacement: bool) -> dict[str, Tensor]:
    """The mean over every minibatch of what one step of `torch.optim.SGD` does to each charge."""
    x, y = (tensor[:count] for tensor in case.batch)
    total: dict[str, Tensor] = {}
    batches = oracles.minibatches(count, sgd.batch_size, replacement=replacement)
    for chosen in batches:
        model = copy.deepcopy(case.model)
        optimizer = torch.optim.SGD(groups_of(model, sgd.weight_decay), lr=sgd.lr)
        index = torch.tensor(chosen)
        case.loss(model, (x[index], y[index])).mean().backward()
        before = charges(case, model)
        optimizer.step()
        for name, charge in charges(case, model).items():
            total[name] = total.get(name, 0) + (charge - before[name]) / len(batches)
    return total


def charges(case: Case, model: nn.Module) -> dict[str, Tensor]:
    """Every charge of a model, under any of the names of its tensors."""
    params = {name: tensor.detach() for name, tensor in model.named_parameters(remove_duplicate=False)}
    return {name: symmetry.charge(params) for name, symmetry in case.symmetries.items()}


def step_matches_torch(
    case: Case, batch_size: int, weight_decay: float | dict[str, float], *, replacement: bool, count: int = 4
) -> None:
    """`expected_step` and `drift` against every minibatch of a small data set through `torch.optim.SGD`."""
    sgd = nf.SGD(0.1, batch_size, weight_decay, replacement=replacement, dataset_size=None if replacement else count)
    noise = nf.estimate_noise(case.model, case.loss, [tuple(t[:count] for t in case.batch)], case.symmetries)
    measured = mean_move(case, sgd, count, replacement=replacement)
    expected = nf.expected_step(noise, sgd, case.model)
    rates = nf.drift(noise, sgd, case.model)
    for name in case.symmetries:
        torch.testing.assert_close(measured[name], expected[name], rtol=1e-9, atol=1e-13)
        # What a step of finite size adds to lr * drift: the charge of the mean gradient of loss and weight decay.
        mean = {p: noise.mean[p] + decay_of(weight_decay, p) * tensor for p, tensor in case.params.items()}
        extra = sgd.lr**2 * noise.symmetries[name].charge(mean)
        torch.testing.assert_close(measured[name], sgd.lr * rates[name] + extra, rtol=1e-9, atol=1e-13)


def momentum_walk_matches_theory() -> None:
    """A loss whose gradients are its noise, so that the charge of a walk with momentum has a mean in closed form."""
    lr, momentum, steps = 0.01, 0.8, 400
    slow = nf.SGD(lr, 1, momentum=momentum)
    net = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    length = {"length": nf.ScalarSymmetry(plus=nf.Axis("weight", 0))}
    trajectory = nf.simulate(
        net,
        lambda model, z: model(z).squeeze(1),
        lambda count, generator: torch.randn(count, 3, generator=generator, dtype=torch.float64),
        slow,
        steps=steps,
        start={"weight": torch.zeros(4096, 1, 3, dtype=torch.float64)},
        symmetries=length,
        record=steps,
    )
    # E|theta|^2 = sum of squared weights of every past gradient in today's position.
    weights = [lr * (1 - momentum ** (steps - k)) / (1 - momentum) for k in range(steps)]
    exact = 3 * sum(weight**2 for weight in weights)
    grown = trajectory.charges["length"][-1]
    error = (grown.std() / len(grown) ** 0.5).item()
    assert abs(grown.mean().item() - exact) < 4 * error
    theory = steps * slow.effective_lr * 2 * slow.temperature * 3
    assert abs(theory / exact - 1) < 0.02


def move(case: Case, x: dict[str, Tensor]) -> nn.Module:
    """The model elsewhere on its orbit, by matrix exponentials of generators built entry by entry."""
    model = copy.deepcopy(case.model)
    parameters = list(model.parameters())
    theta = torch.cat([p.detach().reshape(-1) for p in parameters])
    for name, coordinate in x.items():
        theta = torch.linalg.matrix_exp(oracles.generator(case.symmetries[name], case.model, coordinate)) @ theta
    nn.utils.vector_to_parameters(theta, parameters)
    return model


def potential_by_definition(
    case: Case, x: dict[str, Tensor], lr: float, size: int, weight_decay: float | dict[str, float]
) -> float:
    """2 gamma |theta_x|^2 + sigma^2 Tr Sigma(theta_x), Sigma measured at the moved point; factors written out."""
    model = move(case, x)
    _, sigma = oracles.covariance(model, case.loss, case.batch)
    norm = sum(decay_of(weight_decay, name) * p.detach().square().sum() for name, p in model.named_parameters())
    return float(norm + lr / (2 * size) * sigma.trace())


def potential_matches_definition(case: Case, weight_decay: float | dict[str, float]) -> None:
    """`potential` at the origin and at random points against its definition, everything measured anew."""
    sgd, noise = nf.SGD(0.1, 5, weight_decay), noise_of(case)
    generator = torch.Generator().manual_seed(1)
    for scale in (0.0, 0.4):
        x = {}
        for name, symmetry in case.symmetries.items():
            basis = along(symmetry, case.model)
            weights = scale * torch.randn(len(basis), generator=generator, dtype=torch.float64)
            x[name] = sum(w * b for w, b in zip(weights, basis, strict=True))
        expected = potential_by_definition(case, x, 0.1, 5, weight_decay)
        found = nf.potential(noise, sgd, case.model, x)
        torch.testing.assert_close(found.item(), expected, rtol=1e-9, atol=0)


def equilibrium_matches_scipy(case: Case, weight_decay: float | dict[str, float]) -> None:
    """`solve_equilibrium` against brute-force minimisation of the potential by scipy."""
    lr, size = 0.1, 5
    noise = noise_of(case)
    equilibrium = nf.solve_equilibrium(noise, nf.SGD(lr, size, weight_decay), case.model)
    assert equilibrium.status is nf.Status.CONVERGED, equilibrium.message
    params = {name: p.detach() for name, p in case.model.named_parameters()}
    theta, decay = oracles.flat(params), decay_vector(case, weight_decay)
    _, sigma = oracles.covariance(case.model, case.loss, case.batch)
    generators = [
        oracles.generator(symmetry, case.model, basis)
        for symmetry in case.symmetries.values()
        for basis in along(symmetry, case.model)
    ]

    def value(weights: Any) -> tuple[float, Any]:
        x = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
        # Symmetries that share entries commute, the others do not meet: one exponential of the sum.
        element = torch.linalg.matrix_exp(sum(w * q for w, q in zip(x, generators, strict=True)))
        inverse = torch.linalg.matrix_exp(-sum(w * q for w, q in zip(x, generators, strict=True)))
        phi = (decay * (element @ theta).square()).sum()
        phi = phi + lr / (2 * size) * (inverse @ sigma @ inverse).trace()
        (slope,) = torch.autograd.grad(phi, x)
        return phi.item(), slope.numpy()

    best = scipy.optimize.minimize(
        value, [0.0] * len(generators), jac=True, method="BFGS", options={"gtol": 1e-12, "maxiter": 2000}
    )
    # Points of the orbit are compared, not coordinates: a symmetry that others contain has none of its own.
    weights = torch.tensor(best.x)
    element = torch.linalg.matrix_exp(sum(w * q for w, q in zip(weights, generators, strict=True)))
    found = oracles.flat({name: equilibrium.params[name] for name in params})
    torch.testing.assert_close(found, element @ theta, rtol=1e-6, atol=1e-6)
    assert equilibrium.potential_after <= best.fun * (1 + 1e-12)


def no_drift_after_rebalance(case: Case, weight_decay: float | dict[str, float]) -> None:
    """Every drift, measured anew after the move, is gone; and no example's loss has changed."""
    sgd, noise = nf.SGD(0.1, 5, weight_decay), noise_of(case)
    before = nf.drift(noise, sgd, case.model)
    losses = case.loss(case.model, case.batch).detach()
    equilibrium = nf.solve_equilibrium(noise, sgd, case.model, throw=True)
    nf.rebalance_(case.model, equilibrium, case.loss, case.batch)
    after = nf.drift(noise_of(case), sgd, case.model)
    for name in case.symmetries:
        assert after[name].abs().max() <= 1e-9 * before[name].abs().max()
    torch.testing.assert_close(case.loss(case.model, case.batch).detach(), losses, rtol=1e-11, atol=1e-12)


def moved_by(
    equilibrium: nf.Equilibrium, model: nn.Module, symmetries: dict[str, nf.Symmetry], coordinates: dict[str, Tensor]
) -> nf.Equilibrium:
    """An equilibrium that claims to lie elsewhere: where these group elements take the model."""
    params = {name: tensor.detach().double() for name, tensor in model.named_parameters()}
    for name, symmetry in symmetries.items():
        params = symmetry.act(coordinates[name], params)
    return dataclasses.replace(equilibrium, params=params, symmetries=symmetries, coordinates=coordinates)


def symmetry_holds(case: Case) -> None:
    """Every declared symmetry leaves only rounding."""
    for name, symmetry in case.symmetries.items():
        residual = nf.verify_symmetry(case.model, case.loss, case.batch, symmetry)
        assert residual < 1e-11, (name, residual)


def riccati_solves(size: int, condition: float, seed: int) -> None:
    """X R X = P to 1e-12 for a random pair far from commuting."""
    p, r = spd_pair(size, condition, seed)
    x = _spd.riccati(r, p)
    torch.testing.assert_close(x, x.mT, rtol=0, atol=0)
    assert torch.linalg.eigvalsh(x)[0] > 0
    assert torch.linalg.norm(x @ r @ x - p) <= 1e-12 * torch.linalg.norm(p)


def spd_pair(size: int, condition: float, seed: int) -> tuple[Tensor, Tensor]:
    """Two SPD matrices with independent random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)

    def one() -> Tensor:
        q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
        values = torch.logspace(0, -torch.tensor(condition).log10().item(), size, dtype=torch.float64)
        return _spd.symmetric((q * values) @ q.mT)

    return one(), one()
