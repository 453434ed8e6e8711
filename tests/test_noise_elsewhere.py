"""The noise at other parameters than those of the model, of parameters that are measured example by example, too."""

import pytest
import torch
from torch import nn

import noetherflow as nf
from noetherflow.noise.estimate import Estimate
from noetherflow.noise.exact import Subject
from zoo import regression


class Recurrent(nn.Module):
    """A layer that is measured example by example."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNN(3, 3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cell(x[:, None])[0][:, 0]


@pytest.mark.parametrize("exact", [False, True])
def test_the_noise_elsewhere_is_that_of_a_model_there(exact: bool) -> None:
    torch.manual_seed(0)
    model, loss, batch = regression(nn.Sequential(nn.Linear(3, 3), Recurrent()).double(), (3,), (3,))
    batch = tuple(tensor.double() for tensor in batch)
    estimate = Estimate(Subject.of(model, loss, {}, None), exact=exact, variances=True, max_bytes=10**8)
    estimate.add(batch, "batch 0")
    here = estimate.take()
    moved = {name: 1.5 * tensor for name, tensor in estimate.trained.items()}
    elsewhere = estimate.at(moved)
    elsewhere.add(batch, "batch 0")
    there = elsewhere.take()
    assert here is not None
    assert there is not None
    assert set(there.fallback) == (
        set() if exact else {f"1.cell.{name}_l0" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(moved[name])
    fresh = nf.estimate_noise(model, loss, [batch], {}, exact=True, progress=False)
    for name, gradient in fresh.mean.items():
        torch.testing.assert_close(there.mean[name], gradient, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(there.trace, fresh.trace, rtol=1e-10, atol=0.0)
    assert not torch.isclose(here.trace, fresh.trace, rtol=1e-3)
