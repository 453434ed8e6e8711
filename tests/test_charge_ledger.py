"""The account of the charges: an identity for any optimizer, and each part against explicit matrices."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

import noetherflow as nf
import oracles
from charge_oracles import OPTIMIZERS, SHRINK, Forms, all_of, backward, batches, loss, network, symmetries, vector


def along_axes() -> dict[str, nf.Symmetry]:
    return {name: symmetry for name, symmetry in symmetries().items() if name != "dense"}


def summed(parts: nf.ChargeParts) -> Tensor:
    return sum((value for name, value in parts.items() if name != "change"), torch.zeros(()))


@pytest.mark.parametrize(
    ("name", "steps"),
    [(name, 100) for name in OPTIMIZERS]
    + [pytest.param(name, 2000, marks=[] if name == "momentum" else [pytest.mark.slow]) for name in OPTIMIZERS],
)
def test_the_identity_over_many_steps(name: str, steps: int) -> None:
    """Every step, and all together: the parts add up to what the charge changed, in extended precision."""
    make, decay = OPTIMIZERS[name]
    model = network()
    optimizers = make(model)
    account = nf.ChargeLedger(model, along_axes(), optimizers, decay=decay)
    forms = {key: Forms(symmetry, model) for key, symmetry in account.symmetries.items()}
    first = before = vector(dict(model.named_parameters()))
    total = {key: torch.zeros(form.shape, dtype=torch.float64) for key, form in forms.items()}
    for step, batch in enumerate(batches(steps)):
        backward(model, batch)
        with account.step():
            for optimizer in all_of(optimizers):
                optimizer.step()
        after = vector(dict(model.named_parameters()))
        for key, form in forms.items():
            parts = account.last[key]
            total[key] += summed(parts)
            if step % 20 == 0 or step < 20:
                size = np.linalg.norm(after) * np.linalg.norm(after - before)
                assert np.abs(summed(parts).numpy() - (form(after) - form(before))).max() <= 1e-14 * size
        before = after
    assert account.steps == account.split_steps == steps
    for key, form in forms.items():
        truth, scale = form(before) - form(first), np.linalg.norm(before) ** 2
        for value in (total[key], account.totals[key].change, summed(account.totals[key])):
            assert np.abs(value.numpy() - truth).max() <= 1e-12 * min(np.abs(truth).max(), scale)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_part_against_explicit_matrices(name: str) -> None:
    make, decay = OPTIMIZERS[name]
    model = network()
    optimizers = make(model)
    account = nf.ChargeLedger(model, symmetries(), optimizers, decay=decay)
    forms = {key: Forms(symmetry, model) for key, symmetry in account.symmetries.items()}
    for batch in batches(30):
        theta = vector(dict(model.named_parameters()))
        backward(model, batch)
        with account.step():
            for optimizer in all_of(optimizers):
                optimizer.step()
        u = -SHRINK.get(name, 0.0) * theta
        r = vector(dict(model.named_parameters())) - theta - u
        size = np.linalg.norm(theta) * np.linalg.norm(r + u)
        for key, form in forms.items():
            expected = {
                "decay": 2 * form(theta, u) + form(u),
                "broken": 2 * form(theta + u, r),
                "kick": form(r),
            }
            for part, value in account.last[key].items():
                if part != "change":
                    assert np.abs(value.numpy() - expected.get(part, 0.0)).max() <= 1e-14 * size, part
    shrinks = any(parts.decay.abs().max() > 0 for parts in account.totals.values())
    assert shrinks == (name in SHRINK)


def largest(account: nf.ChargeLedger, part: str) -> float:
    return max(float(getattr(parts, part).abs().max()) for parts in account.totals.values())


@pytest.mark.parametrize(
    ("settings", "zero"),
    [
        ({"weight_decay": 0.02}, True),
        ({"weight_decay": 0.02, "maximize": True}, True),
        ({"weight_decay": 0.02, "momentum": 0.5}, False),
        ({"groups": True}, False),
    ],
    ids=["plain", "maximising", "momentum", "two learning rates"],
)
def test_plain_sgd_breaks_no_symmetry(settings: dict[str, float], zero: bool) -> None:
    model = network()
    settings = dict(settings)
    groups = [{"params": [model[0].weight, model[1].weight], "lr": 0.01}, {"params": model[3].parameters()}]
    given = groups if settings.pop("groups", False) else model.parameters()
    optimizer = torch.optim.SGD(given, lr=0.005, **settings)
    account = nf.ChargeLedger(model, symmetries(), optimizer)
    for batch in batches(20):
        backward(model, batch)
        with account.step():
            optimizer.step()
    if zero:
        assert largest(account, "broken") < 1e-13
        assert largest(account, "kick") > 1e-4
    else:
        assert largest(account, "broken") > 0.1 * largest(account, "kick")


def measured_step(
    account: nf.ChargeLedger,
    meter: nf.NoiseMeter,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    clip: float | None = None,
) -> None:
    optimizer.zero_grad()
    with meter.step(batch):
        loss(model, batch).mean().backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    with account.step():
        optimizer.step()


@pytest.mark.parametrize("size", [2, 3])
def test_noise_and_mean_on_average_over_all_minibatches(size: int) -> None:
    """Drawn with replacement from 4 examples: every minibatch once, from the parameters at the start."""
    model, data = network(), next(batches(1, 4))
    lr, start = 0.01, {name: p.detach().clone() for name, p in model.named_parameters()}
    given = along_axes()
    settings = nf.SGD(lr=lr, batch_size=size, weight_decay=0.3)
    step = nf.expected_step(nf.estimate_noise(model, loss, [data], given, exact=True), settings, model)
    mean, sigma = oracles.covariance(model, loss, data)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=0.3)
    meter = nf.NoiseMeter(model, given)
    account = nf.ChargeLedger(model, given, optimizer, meter=meter)
    forms = {name: Forms(symmetry, model) for name, symmetry in account.symmetries.items()}
    minibatches = list(itertools.product(range(4), repeat=size))
    seen = {name: [] for name in given}
    for chosen in minibatches:
        model.load_state_dict(start)
        measured_step(account, meter, model, optimizer, tuple(part[list(chosen)] for part in data))
        for name in given:
            seen[name].append(account.last[name])
    assert account.steps - account.measured_steps == 4 == meter.skipped  # equal examples have no noise
    for name, form in forms.items():
        change, noise, average, kick = (
            torch.stack([getattr(parts, part) for parts in seen[name]]).mean(0)
            for part in ("change", "noise", "mean", "kick")
        )
        between = torch.stack([parts.between for parts in seen[name]]).mean(0)
        trace = np.einsum("kij,ij->k", form.matrices, sigma.detach().double().numpy()).reshape(form.shape)
        squared = form(vector({"mean": mean}))
        # The kick of 4 minibatches of equal examples is not told apart, and has no noise in it.
        np.testing.assert_allclose(noise, (lr**2 * trace / size).astype(float), rtol=1e-11, atol=1e-16)
        np.testing.assert_allclose(average + kick, (lr**2 * squared).astype(float), rtol=1e-10, atol=1e-16)
        torch.testing.assert_close(change - between, step[name], rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_noise_of_a_step_with_clipping_groups_and_a_loss_scale(clip: float | None, scale: float) -> None:
    model, batch = network(), next(batches(1, 7))
    given = along_axes()
    groups = [{"params": list(model[:2].parameters()), "lr": 0.02}, {"params": list(model[3].parameters())}]
    optimizer = torch.optim.SGD(groups, lr=0.005)
    meter = nf.NoiseMeter(model, given)
    account = nf.ChargeLedger(model, given, optimizer, meter=meter)
    rows = torch.stack([oracles.flat(gradient) for gradient in oracles.gradients(model, loss, batch)]).detach()
    with meter.step(batch):
        (scale * loss(model, batch).mean()).backward()
    for parameter in model.parameters():
        parameter.grad /= scale
    norm = rows.mean(0).norm()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    with account.step():
        optimizer.step()
    assert account.measured_steps == 1
    clipped = 1.0 if clip is None else float(clip / (norm + 1e-6))
    lr = oracles.flat(
        {name: torch.full_like(p, 0.005 if name.startswith("3") else 0.02) for name, p in model.named_parameters()}
    )
    centred = (rows - rows.mean(0)) * lr.detach() * clipped
    covariance = centred.mT @ centred / 6
    for name, symmetry in account.symmetries.items():
        form = Forms(symmetry, model)
        trace = np.einsum("kij,ij->k", form.matrices, covariance.numpy()).reshape(form.shape)
        np.testing.assert_allclose(account.last[name].noise, (trace / 7).astype(float), rtol=1e-9, atol=1e-18)
        kick = form(vector({"step": lr * clipped * rows.mean(0)}))
        parts = account.last[name]
        np.testing.assert_allclose(parts.noise + parts.mean, kick.astype(float), rtol=1e-9, atol=1e-16)
        assert not parts.kick.any()


def test_noise_between_microbatches() -> None:
    model, given = network(), along_axes()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    meter = nf.MicrobatchMeter(model, given)
    account = nf.ChargeLedger(model, given, optimizer, meter=meter)
    parts = list(batches(4, 5))
    rows = []
    for part in parts:
        backward(model, part)
        rows.append(oracles.flat({name: p.grad.clone() for name, p in model.named_parameters()}))
    model.zero_grad()
    with meter.step() as done:
        for part in parts:
            (loss(model, part).mean() / 4).backward()
            done(size=5, weight=1 / 4)
    with account.step():
        optimizer.step()
    centred = torch.stack(rows) - torch.stack(rows).mean(0)
    for name, symmetry in account.symmetries.items():
        form = Forms(symmetry, model)
        covariance = (5 * centred.mT @ centred / 3).numpy()
        trace = np.einsum("kij,ij->k", form.matrices, covariance).reshape(form.shape)
        np.testing.assert_allclose(account.last[name].noise, (1e-4 * trace / 20).astype(float), rtol=1e-9, atol=1e-18)
