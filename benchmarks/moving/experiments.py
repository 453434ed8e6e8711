"""The experiments: each takes models and gives rows of numbers, a row for each model, seed and setting."""

import copy
import math
import statistics
import warnings
from typing import Any

import lora
import numpy as np
import text
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

import noetherflow as nf

from .subjects import Subject, language, mlp

Row = dict[str, Any]
HESSIAN_EXAMPLES = 256
TRIAL_STEPS, WARM_STEPS = 100, 100
CHECKPOINTS = (20, 200)


def at_once(subject: Subject) -> Row:
    """What is different right after the move: noise, norm, sharpness, gradient; and on data that was not used."""
    equilibrium = subject.equilibrium(holdout=True)
    moved = subject.copy()
    subject.move(moved, equilibrium)
    pair = (subject.model, moved)
    return {
        "distance": _rms(equilibrium),
        "at rest": sum(equilibrium.at_rest.values()),
        "symmetries": len(equilibrium.outcomes),
        "converged": sum(outcome.status is nf.Status.CONVERGED for outcome in equilibrium.outcomes.values()),
        "trace": [equilibrium.trace_before, equilibrium.trace_after],
        "norm": [sum(float(p.detach().square().sum()) for p in model.parameters()) for model in pair],
        "sharpness": [sharpness(subject, model) for model in pair],
        "largest lr": [largest_rate(subject, model) for model in pair],
        "imbalance, used": _means(equilibrium.imbalance),
        "imbalance, unused": _means(equilibrium.holdout),
        "median steps": statistics.median(
            float(step) for steps in equilibrium.relaxation_steps.values() for step in steps.flatten()
        ),
    }


def sharpness(subject: Subject, model: nn.Module) -> float:
    """The largest eigenvalue of the Hessian of the mean loss over 256 examples."""
    batch = subject.used[:HESSIAN_EXAMPLES]
    copied = copy.deepcopy(model)
    params = [p for p in copied.parameters() if p.requires_grad]
    # The other kernels of attention have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.grad(subject.loss(copied, batch).mean(), params, create_graph=True)
    flat = torch.cat([part.flatten() for part in gradient])

    def product(vector: np.ndarray) -> np.ndarray:
        direction = torch.from_numpy(np.ascontiguousarray(vector)).flatten()
        parts = torch.autograd.grad(flat @ direction, params, retain_graph=True)
        return torch.cat([part.flatten() for part in parts]).numpy()

    start = np.random.default_rng(0).standard_normal(len(flat))
    operator = LinearOperator((len(flat), len(flat)), matvec=product, dtype=np.float64)
    return float(eigsh(operator, k=1, which="LA", v0=start, tol=1e-3, return_eigenvectors=False)[0])


def largest_rate(subject: Subject, model: nn.Module) -> float:
    """The largest lr = 0.0125 * 2^(k/4) with which SGD is stable; geometric mean over three orders of the data.

    Stable: over the last 50 of 100 steps, the mean loss of the batches is at most twice the loss at the start.
    """
    limit = 2 * subject.mean_loss(model)

    def stable(power: int, order: int) -> bool:
        copied = copy.deepcopy(model)
        losses: list[float] = []
        optimizer = subject.optimizer("SGD", copied, 0.0125 * 2 ** (power / 4))
        subject.steps(copied, optimizer, subject.batches(order), TRIAL_STEPS, losses.append)
        return statistics.fmean(losses[TRIAL_STEPS // 2 :]) <= limit

    powers = []
    for order in (7, 8, 9):
        low, high = -8, 40
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if stable(middle, order) else (low, middle)
        powers.append(low)
    return 0.0125 * 2 ** (statistics.fmean(powers) / 4)


def continuation(subject: Subject, kind: str, seed: int) -> Row:
    """Losses of further training with the same batches: from where the model is, and after the move.

    The optimizer first makes 100 steps, so that its averages are those of training.
    """
    staying = subject.copy()
    optimizer = subject.optimizer(kind, staying)
    batches = subject.batches(seed + 100)
    subject.steps(staying, optimizer, batches, WARM_STEPS)
    moving, other = copy.deepcopy((staying, optimizer))
    equilibrium = subject.equilibrium(staying)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on second moments, which are transported
        subject.move(moving, equilibrium, other)
    row: Row = {"start": subject.mean_loss(staying)}
    # Two iterators of equal seeds: the same batches in the same order.
    for name, model, each in (("stays", staying, optimizer), ("moves", moving, other)):
        coming, done = subject.batches(seed + 200), 0
        for count in CHECKPOINTS:
            subject.steps(model, each, coming, count - done)
            done = count
            row[f"{name}, {count}"] = subject.mean_loss(model)
        row[f"{name}, unused"] = subject.mean_loss(model, unused=True)
    return row


def course(weight_decay: float, epochs: tuple[int, ...], seed: int) -> list[Row]:
    """Distance, imbalance and noise along a training of the MLP."""
    rows = []
    subject = mlp(seed, epochs=0, weight_decay=weight_decay)
    batches, optimizer, done = subject.batches(seed), subject.optimizer("SGD", subject.model), 0
    per_epoch = len(subject.used) // subject.sgd.batch_size
    for count in epochs:
        subject.steps(subject.model, optimizer, batches, (count - done) * per_epoch)
        done = count
        equilibrium = subject.equilibrium()
        steps = torch.cat([t.flatten() for t in equilibrium.relaxation_steps.values()])
        rows.append(
            {
                "weight decay": weight_decay,
                "steps": count * per_epoch,
                "distance": _rms(equilibrium),
                "error": _rms_of(equilibrium.error, equilibrium),
                "imbalance": _means(equilibrium.imbalance)[0],
                "at rest": sum(equilibrium.at_rest.values()),
                "trace": [equilibrium.trace_before, equilibrium.trace_after],
                "median steps": float(steps[steps.isfinite()].median()),
            }
        )
    return rows


def decays(subject: Subject, weight_decay: float) -> Row:
    """Noise and norm at the equilibrium that belongs to a weight decay, of a model that is given."""
    sgd = subject.sgd
    settings = nf.SGD(sgd.lr, sgd.batch_size, weight_decay, sgd.momentum, sgd.replacement, sgd.dataset_size)
    equilibrium = subject.equilibrium(sgd=settings)
    norm = sum(float(p.detach().square().sum()) for p in subject.model.parameters())
    return {
        "weight decay": weight_decay,
        "status": equilibrium.status.name.lower(),
        "distance": _rms(equilibrium),
        "trace": [equilibrium.trace_before, equilibrium.trace_after],
        "norm": [norm, sum(float(p.square().sum()) for p in equilibrium.params.values())],
    }


def adapters(steps: int, seed: int, further: int = 100) -> Row:
    """LoRA after some steps: distance and imbalance, and the loss after 100 more steps with and without the move."""
    model, sgd_optimizer, dataset = lora.adapted(steps, seed)
    sgd = nf.SGD.from_optimizer(sgd_optimizer, batch_size=lora.BATCH_SIZE)
    equilibrium = nf.equilibrate(model, text.loss, DataLoader(dataset, 64), sgd, progress=False)
    row: Row = {"steps": steps, "status": equilibrium.status.name.lower()}
    if equilibrium.status is not nf.Status.CONVERGED:
        return row | {"message": equilibrium.message.splitlines()[0]}
    subject = Subject("LoRA", model, text.loss, dataset, dataset, sgd, 1e-2)
    moved = subject.copy()
    subject.move(moved, equilibrium)
    row |= {"distance": _rms(equilibrium), "imbalance": _means(equilibrium.imbalance)[0]}
    row |= {"start": subject.mean_loss(model), "trace": [equilibrium.trace_before, equilibrium.trace_after]}
    for kind in ("SGD", "AdamW"):
        for name, each in (("stays", subject.copy()), ("moves", copy.deepcopy(moved))):
            trained = [p for p in each.parameters() if p.requires_grad]
            lr = lora.LR if kind == "SGD" else subject.adam_lr
            optimizer = getattr(torch.optim, kind)(trained, lr=lr, weight_decay=lora.WEIGHT_DECAY)
            subject.steps(each, optimizer, subject.batches(seed + 200), further)
            row[f"{kind}, {name}"] = subject.mean_loss(each)
    return row


def adamw(seed: int = 0, count: int = 20) -> dict[str, list[float]]:
    """Losses of the next steps of AdamW on GPT-2: without the move, with it, and with the state left behind."""
    subject = language(seed)
    start = subject.copy()
    optimizer = subject.optimizer("AdamW", start)
    subject.steps(start, optimizer, subject.batches(seed + 100), WARM_STEPS)
    equilibrium = subject.equilibrium(start)
    losses: dict[str, list[float]] = {}
    for name in ("stays", "moves, transport", "moves, reset", "moves, state left behind"):
        model, each = copy.deepcopy((start, optimizer))
        if name != "stays":
            batch = subject.used[:64]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # on second moments, which the names tell
                if name == "moves, state left behind":
                    nf.rebalance_(model, equilibrium, text.loss, batch)
                else:
                    way = "reset" if "reset" in name else "transport"
                    nf.rebalance_(model, equilibrium, text.loss, batch, optimizer=each, second_moments=way)
        losses[name] = []
        subject.steps(model, each, subject.batches(seed + 200), count, losses[name].append)
    return losses


def _rms(equilibrium: nf.Equilibrium) -> float:
    return _rms_of(equilibrium.distance, equilibrium)


def _rms_of(values: dict[str, float], equilibrium: nf.Equilibrium) -> float:
    """Root mean square over all coordinates, from that of each symmetry."""
    rows = {name: x.shape[0] if x.ndim else 1 for name, x in equilibrium.coordinates.items()}
    total = sum(values[name] ** 2 * rows[name] for name in rows)
    return math.sqrt(total / sum(rows.values()))


def _means(imbalances: dict[str, nf.Imbalance]) -> list[float]:
    """Before and after, averaged over symmetries."""
    return [statistics.fmean(getattr(value, when) for value in imbalances.values()) for when in ("before", "after")]
