"""The equilibrium of symmetries that share tensors: against brute force, from several starts, and its refusals."""

import copy

import pytest
import scipy.optimize
import torch
from torch import Tensor, nn

import checks
import noetherflow as nf
import oracles
from cases import Case, case, cases, make, squared_error

SGD = nf.SGD(0.1, 5, 0.02)


def layers() -> Case:
    """Three linear layers in a row: two groups of matrices share the weight in the middle."""
    net = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3)))
    rotations = {
        f"{k} -> {k + 1}": nf.MatrixSymmetry(nf.Axis(f"{k}.weight", 0), nf.Axis(f"{k + 1}.weight", 1)) for k in (0, 1)
    }
    return Case("three linear layers", net, squared_error, (torch.randn(24, 3), torch.randn(24, 3)), rotations)


class Block(nn.Module):
    """A norm with a gain, read by two heads of dimension 2."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.q, self.k, self.v = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.o = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        q, k, v = (layer(x).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = (q @ k.mT).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2)).mean(1)


def attention() -> Case:
    net = Block()
    nn.init.normal_(net.norm.weight, 1.0, 0.2)
    data = torch.randn(20, 3, 4), torch.randn(20, 2)
    return Case("norm gain and heads", net, squared_error, data, nf.find_symmetries(net, squared_error, data))


def brute_force(one: Case, sgd: nf.SGD) -> float:
    """scipy's minimum of the potential, with the gradient of every example taken anew at every trial point."""
    origin = {name: tensor.detach() for name, tensor in one.model.named_parameters()}
    model = copy.deepcopy(one.model)
    identities = {name: symmetry.identity(origin) for name, symmetry in one.symmetries.items()}
    bases = {name: oracles.coordinates(symmetry, origin) for name, symmetry in one.symmetries.items()}
    sizes = [len(basis) for basis in bases.values()]

    def point(weights: Tensor) -> dict[str, Tensor]:
        params = origin
        for part, (name, symmetry) in zip(weights.split(sizes), one.symmetries.items(), strict=True):
            x = sum((w * b for w, b in zip(part, bases[name], strict=True)), identities[name])
            params = symmetry.act(x, params)
        return params

    def potential(weights: object) -> float:
        params = point(torch.tensor(weights, dtype=torch.float64))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(params[name])
        _, sigma = oracles.covariance(model, one.loss, one.batch)
        norm = sum(tensor.square().sum() for tensor in params.values())
        return float(2 * sgd.gamma * norm + sgd.temperature * sigma.trace())

    lowest = float("inf")
    while True:
        # Started again from where it ended: finite differences end a search early.
        best = scipy.optimize.minimize(potential, [0.0] * sum(sizes), jac="3-point", method="BFGS")
        if best.fun > lowest * (1 - 1e-9):
            return lowest
        lowest, origin = best.fun, point(torch.tensor(best.x))


@pytest.mark.parametrize("build", [layers, attention])
def test_brute_force_does_not_get_lower(build: object) -> None:
    one = make(build)
    found = nf.equilibrate(one.model, one.loss, one.loader(), SGD, one.symmetries, tolerance=1e-9)
    assert found.status is nf.Status.CONVERGED
    assert found.passes > 2
    assert found.potential_after == pytest.approx(brute_force(one, SGD), rel=1e-6)
