"""A pretended device refuses what CUDA refuses, and gives a right program the numbers of the CPU."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

import pretended
from pretended import NAME, WITHOUT_FLOAT64, placed, pretending

HERE, THERE = torch.device(NAME, 0), torch.device(NAME, 1)


def away(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(HERE)


class Adds(torch.autograd.Function):
    """The identity, whose backward pass adds a tensor of the CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient + torch.ones(3)


REFUSED: dict[str, Callable[[], object]] = {
    "two devices": lambda: away(3) + torch.ones(3),
    "a vector of the CPU in a product": lambda: away(3, 3) @ torch.ones(3).double(),
    "a number of the CPU in a stack": lambda: torch.stack([away(3).sum(), torch.ones(()).double()]),
    "two pretended devices": lambda: away(3) + away(3).to(THERE),
    "a number of the device and a vector of the CPU": lambda: torch.ones(3) * away(3).sum(),
    "an index of the device": lambda: torch.ones(3)[torch.zeros(1, dtype=torch.long, device=HERE)],
    "inside vmap": lambda: vmap(lambda x: x + torch.ones(3))(away(2, 3)),
    "inside grad": lambda: grad(lambda x: (x * torch.ones(3)).sum())(away(3)),
    "numpy": lambda: away(3).numpy(),
    "asarray": lambda: np.asarray(away(3)),
    "a driver": lambda: torch.linalg.lstsq(away(3, 2), away(3, 1), driver="gelsd"),
    "a generator of the CPU": lambda: torch.randn(3, generator=torch.Generator(), device=HERE),
    "a permutation by a generator of the CPU": lambda: torch.randperm(3, generator=torch.Generator(), device=HERE),
    "a draw in place": lambda: away(3).normal_(generator=torch.Generator()),
    "histogram": lambda: torch.histogram(away(3)),
    "a backward pass": lambda: Adds.apply(away(3).requires_grad_()).sum().backward(),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cuda_refuses_raises(what: str) -> None:
    with pretending() as mistakes:
        with contextlib.suppress(RuntimeError, TypeError, NotImplementedError):
            REFUSED[what]()
        assert mistakes
        mistakes.clear()


def test_a_mistake_that_is_caught_is_noticed_at_the_end_of_the_block() -> None:
    def program() -> None:
        with pretending(), contextlib.suppress(RuntimeError):
            REFUSED["two devices"]()

    with pytest.raises(AssertionError, match="same device"):
        program()


ALLOWED: dict[str, Callable[[torch.device], Tensor]] = {
    "factories": lambda d: torch.cat([
        torch.zeros(2, device=d), torch.ones(2, device=d), torch.full((2,), 3.0, device=d), torch.eye(2, device=d)[0],
        torch.arange(2.0, device=d), torch.linspace(0, 1, 3, device=d), torch.tensor([1.0], device=d),
        torch.as_tensor([2.0], device=d), torch.empty(2, device=d).fill_(1.0), torch.tril_indices(2, 2, device=d)[0],
    ]),
    "a number of the CPU": lambda d: torch.ones(3, device=d) * torch.tensor(2.0),
    "an index of the CPU": lambda d: torch.arange(3.0, device=d)[torch.tensor([2, 0])],
    "like another": lambda d: torch.zeros_like(torch.ones(2, device=d)).new_tensor([1.0, 2.0]),
    "in place": lambda d: torch.ones(2, 1, 3, device=d).squeeze_(1).mul_(2).t_(),
    "where": lambda d: torch.where(torch.arange(3, device=d) > 1, torch.ones(3, device=d), torch.tensor(0.0)),
    "a view": lambda d: torch.arange(6.0, device=d).view(2, 3).mT[1:],
    "a write through a view": lambda d: (lambda x: (x[0].zero_(), x)[1])(torch.ones(2, 3, device=d)),
    "derivatives of examples": lambda d: vmap(grad(lambda x: (x.sin() * torch.arange(3.0, device=x.device)).sum()))(
        torch.arange(6.0, device=d).view(2, 3)),
    "eigenvalues": lambda d: torch.linalg.eigh(torch.diag(torch.arange(3.0, device=d)))[0],
    "least squares": lambda d: torch.linalg.lstsq(torch.eye(3, device=d)[:, :2], torch.ones(3, 1, device=d)).solution,
    "to another device": lambda d: torch.ones(3, device=d).to(THERE if d == HERE else d).cpu().to(d),
}  # fmt: skip


@pytest.mark.parametrize("what", ALLOWED)
def test_a_right_program_has_the_numbers_of_the_cpu(what: str) -> None:
    expected = ALLOWED[what](torch.device("cpu"))
    with pretending():
        found = ALLOWED[what](HERE)
        assert found.device == HERE
        assert found.shape == expected.shape
        assert torch.equal(found.cpu(), expected)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).double()
    model[2].weight = model[0].weight
    return model


def test_a_training_step_has_the_numbers_of_the_cpu() -> None:
    here, data = tied(), torch.randn(5, 3, dtype=torch.float64)
    with pretending():
        there = placed(here, lambda _: HERE)
        assert there[2].weight is there[0].weight
        assert copy.deepcopy(there)[0].weight is not there[0].weight
        for model, x in ((here, data), (there, data.to(HERE))):
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            model(x).square().sum().backward()
            optimizer.step()
        for name, tensor in here.state_dict().items():
            assert torch.equal(there.state_dict()[name].cpu(), tensor), name


def test_data_of_a_parameter_can_be_replaced() -> None:
    parameter = nn.Parameter(away(3))
    parameter.data = parameter.data.float() * 2
    assert parameter.dtype == torch.float32
    assert torch.equal(parameter.detach().cpu(), parameter.inner)  # type: ignore[attr-defined]


def test_a_device_has_random_numbers_of_its_own() -> None:
    torch.manual_seed(3)
    here, there = torch.randn(4), torch.randn(4, device=HERE)
    assert torch.equal(there.cpu(), here)  # both from the start of seed 3
    after = torch.randn(4)
    with torch.random.fork_rng([0], device_type=NAME):
        forked = torch.randn(4, device=HERE)
    assert torch.equal(torch.randn(4, device=HERE).cpu(), forked.cpu())
    assert torch.equal(after, forked.cpu())


def test_a_device_without_float64() -> None:
    assert torch.ones(3, device=WITHOUT_FLOAT64).dtype == torch.float32
    with pytest.raises(TypeError, match="no float64"):
        torch.ones(3, device=WITHOUT_FLOAT64).double()


def test_the_process_does_not_choose_the_device() -> None:
    assert not torch.accelerator.is_available()
    assert torch.randn(2).device.type == pretended.torch.get_default_device().type == "cpu"
