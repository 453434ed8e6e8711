"""Slow and obvious versions of what the package does fast: loops over examples, and matrices over all parameters."""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import noetherflow as nf


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """All entries of all tensors, in the order of names."""
    return torch.cat([tensors[name].reshape(-1) for name in tensors])


def example(batch: Any, index: int) -> Any:
    """A batch of size 1, of a tensor, or of a tuple or a dictionary of tensors; any other value is shared."""
    if isinstance(batch, dict):
        return {key: example(value, index) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(example(value, index) for value in batch)
    return batch[index : index + 1] if isinstance(batch, Tensor) else batch


def double(batch: Any) -> Any:
    """A batch whose floating-point tensors are in float64."""
    if isinstance(batch, dict):
        return {key: double(value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(double(value) for value in batch)
    return batch.double() if isinstance(batch, Tensor) and batch.is_floating_point() else batch


def by_backward(
    model: nn.Module, loss: nf.Loss, batch: Any, size: int, pick: Callable[[Any, int], Any] = example
) -> dict[str, Tensor]:
    """The gradients of all examples, shape (B, *parameter) by name, by `.backward()` on a copy of the model in float64.

    Reentrant checkpoints accept no list of inputs, so the gradients are read from `.grad`; sparse gradients become
    dense. Every example finds the buffers of the model.
    """
    other = copy.deepcopy(model).double()
    batch = double(batch)
    buffers = {name: tensor.clone() for name, tensor in other.named_buffers()}
    rows: dict[str, list[Tensor]] = {name: [] for name, p in other.named_parameters() if p.requires_grad}
    for index in range(size):
        with torch.no_grad():
            for name, tensor in other.named_buffers():
                tensor.copy_(buffers[name])
        other.zero_grad(set_to_none=True)
        loss(other, pick(batch, index)).sum().backward()
        for name, parameter in other.named_parameters():
            if name in rows:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()
                rows[name].append(gradient.detach().clone())
    return {name: torch.stack(row) for name, row in rows.items()}


def gradients(model: nn.Module, loss: nf.Loss, batch: Any) -> list[dict[str, Tensor]]:
    """The gradient of every example, by a plain backward pass for each; zeros where none arrives."""
    found = []
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    leaves = list(parameters.values())
    for index in range(len(batch if isinstance(batch, Tensor) else batch[0])):
        value = loss(model, example(batch, index)).sum()
        grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        found.append(dict(zip(parameters, grads, strict=True)))
    return found


def stacked(model: nn.Module, loss: nf.Loss, batch: Any) -> dict[str, Tensor]:
    """The gradients of all examples in float64, shape (B, *parameter) by name."""
    single = gradients(model, loss, batch)
    return {name: torch.stack([one[name].double() for one in single]) for name in single[0]}


def covariance(model: nn.Module, loss: nf.Loss, batch: Any) -> tuple[Tensor, Tensor]:
    """The mean gradient and its centred covariance over examples, on all parameters flattened."""
    rows = torch.stack([flat(gradient) for gradient in gradients(model, loss, batch)])
    mean = rows.mean(0)
    return mean, rows.mT @ rows / len(rows) - torch.outer(mean, mean)


def canonical(model: nn.Module, name: str) -> str:
    """The name under which `named_parameters` lists a tensor that may have several."""
    tensor = dict(model.named_parameters(remove_duplicate=False))[name]
    return next(first for first, other in model.named_parameters() if other is tensor)


def generator(symmetry: nf.Symmetry, model: nn.Module, x: Tensor) -> Tensor:
    """Q_x as a matrix on all parameters flattened, built entry by entry from the definition."""
    params = dict(model.named_parameters())
    sizes = [tensor.numel() for tensor in params.values()]
    offset = dict(zip(params, itertools.accumulate(sizes, initial=0), strict=False))
    matrix = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    if isinstance(symmetry, nf.DenseSymmetry):
        index = torch.cat(
            [torch.arange(params[n].numel()) + offset[n] for n in (canonical(model, m) for m in symmetry.names)]
        )
        matrix[index[:, None], index] = x * symmetry.generator
        return matrix
    for side, sign in ((symmetry.plus, 1.0), (symmetry.minus, -1.0)):
        for axis in side:
            name = canonical(model, axis.name)
            for p, row_p, rest_p in _entries(axis, params[name]):
                for q, row_q, rest_q in _entries(axis, params[name]):
                    if rest_p == rest_q:
                        matrix[offset[name] + p, offset[name] + q] += sign * _coefficient(symmetry, x, row_p, row_q)
    return matrix


def _entries(axis: nf.Axis, tensor: Tensor) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Every entry of a slice: its position in the flattened tensor, its row, and where it stands within the row."""
    dim = axis.dim % tensor.ndim
    start = axis.start or 0
    stop = tensor.shape[dim] if axis.stop is None else axis.stop
    other, first, last = axis.within or (dim, start, stop)
    for position, index in enumerate(itertools.product(*map(range, tensor.shape))):
        if start <= index[dim] < stop and first <= index[other] < last:
            row, within = divmod(index[dim] - start, axis.repeat)
            yield position, row, (*index[:dim], within, *index[dim + 1 :])


def _coefficient(symmetry: nf.Symmetry, x: Tensor, p: int, q: int) -> float:
    if isinstance(symmetry, nf.MatrixSymmetry):
        return x[p, q].item()
    if p != q:
        return 0.0
    return x[p].item() if isinstance(symmetry, nf.DiagonalSymmetry) else x.item()


def row_positions(axis: nf.Axis, tensor: Tensor) -> Tensor:
    """Where the rows of an axis lie in the flattened tensor, shape (rows, columns), entry by entry."""
    rows: dict[int, list[tuple[tuple[int, ...], int]]] = {}
    for position, row, within in _entries(axis, tensor):
        rows.setdefault(row, []).append((within, position))
    return torch.tensor([[position for _, position in sorted(rows[row])] for row in sorted(rows)])


def grams(symmetry: nf.Symmetry, model: nn.Module, stack: Mapping[str, Tensor]) -> nf.Grams:
    """Both sides of a symmetry, summed over a stack of vectors of shape (B, *parameter), from the definition."""
    params = dict(model.named_parameters())
    if isinstance(symmetry, nf.DenseSymmetry):
        flattened = torch.cat([stack[canonical(model, name)].flatten(1) for name in symmetry.names], 1)
        values, vectors = torch.linalg.eigh(symmetry.generator)
        squares = (flattened @ vectors).square().sum(0)
        near = [[squares[(values - q).abs() < 1e-6].sum() for q in side] for side in symmetry.eigenvalues]
        return nf.Grams(*(torch.stack(side) if side else squares[:0] for side in near))
    totals = []
    for side in (symmetry.plus, symmetry.minus):
        total = torch.zeros_like(symmetry.identity({name: p.detach().double() for name, p in _named(model).items()}))
        for axis in side:
            name = canonical(model, axis.name)
            rows = stack[name].flatten(1)[:, row_positions(axis, params[name])]
            gram = torch.einsum("bij,bkj->ik", rows, rows)
            matrix = isinstance(symmetry, nf.MatrixSymmetry)
            total = total + (
                gram if matrix else gram.diagonal() if isinstance(symmetry, nf.DiagonalSymmetry) else gram.trace()
            )
        totals.append(total)
    return nf.Grams(*totals)


def _named(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


class Statistics(NamedTuple):
    """What noise moments are compared with; standard errors are of the plus side, the minus side and the net."""

    count: int
    grams: dict[str, nf.Grams]
    variance: dict[str, Tensor]
    trace: Tensor
    errors: dict[str, tuple[Tensor, Tensor, Tensor]]


def statistics(model: nn.Module, stack: dict[str, Tensor], symmetries: Mapping[str, nf.Symmetry]) -> Statistics:
    """Of single examples that are all of the data, whose gradients are stacked: centred second moments."""
    count = len(next(iter(stack.values())))
    centred = {name: gradient - gradient.mean(0) for name, gradient in stack.items()}
    single = [{name: gradient[k : k + 1] for name, gradient in centred.items()} for k in range(count)]
    errors = {}
    for name, symmetry in symmetries.items():
        sides = [_halves(symmetry, grams(symmetry, model, one)) for one in single]
        plus, minus = (torch.stack(side) for side in zip(*sides, strict=True))
        plus, minus, net = (values.std(0) / count**0.5 for values in (plus, minus, plus - minus))
        errors[name] = plus, minus, net
    return Statistics(
        count,
        {n: nf.Grams(*(side / count for side in grams(s, model, centred))) for n, s in symmetries.items()},
        {name: gradient.square().mean(0) for name, gradient in centred.items()},
        sum(gradient.square().sum() for gradient in centred.values()) / count,
        errors,
    )


def _halves(symmetry: nf.Symmetry, sides: nf.Grams) -> tuple[Tensor, Tensor]:
    """Both halves of a charge: of matrices the diagonals, of eigenspaces the weighted sum."""
    if isinstance(symmetry, nf.DenseSymmetry):
        weights = symmetry.eigenvalues
        return (weights.plus * sides.plus).sum(), (weights.minus.abs() * sides.minus).sum()
    plus, minus = (side.diagonal() if side.ndim == 2 else side for side in sides)
    return plus, minus


Step = tuple[dict[str, Tensor], Tensor]  # mean gradients of the parts of a step, and how many examples each part has


def examples_of_step(model: nn.Module, loss: nf.Loss, batch: Any) -> Step:
    """A step whose parts are single examples."""
    stack = stacked(model, loss, batch)
    return stack, torch.ones(len(next(iter(stack.values()))), dtype=torch.float64)


def microbatches_of_step(model: nn.Module, loss: nf.Loss, parts: Sequence[Any]) -> Step:
    """A step whose parts are microbatches: the means of their examples' gradients."""
    stacks = [stacked(model, loss, part) for part in parts]
    sizes = [float(len(next(iter(stack.values())))) for stack in stacks]
    means = {name: torch.stack([stack[name].mean(0) for stack in stacks]) for name in stacks[0]}
    return means, torch.tensor(sizes, dtype=torch.float64)


def pooled(model: nn.Module, steps: Sequence[Step], symmetries: Mapping[str, nf.Symmetry]) -> Statistics:
    """Of one example, from steps each centred by its mean: unbiased, with the standard errors between steps."""
    total: dict[str, Tensor] = {}
    values: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in symmetries}
    sums = {name: None for name in symmetries}
    freedom, examples = 0, []
    for stack, sizes in steps:
        if len(sizes) < 2:
            continue
        freedom += len(sizes) - 1
        examples.append(sizes.sum())
        centred = {}
        for name, gradient in stack.items():
            weights = sizes.reshape(-1, *(1,) * (gradient.ndim - 1))
            centred[name] = (gradient - (weights * gradient).sum(0) / sizes.sum()) * weights.sqrt()
            total[name] = total.get(name, 0) + centred[name].square().sum(0)
        for name, symmetry in symmetries.items():
            sides = grams(symmetry, model, centred)
            known = sums[name]
            sums[name] = sides if known is None else nf.Grams(*(a + b for a, b in zip(known, sides, strict=True)))
            halves = _halves(symmetry, sides)
            values[name].append((halves[0] / (len(sizes) - 1), halves[1] / (len(sizes) - 1)))
    weights = torch.stack(examples)
    errors = {}
    for name, each in values.items():
        plus, minus = (torch.stack(side) for side in zip(*each, strict=True))
        plus, minus, net = (_weighted_error(side, weights) for side in (plus, minus, plus - minus))
        errors[name] = plus, minus, net
    return Statistics(
        int(weights.sum()),
        {name: nf.Grams(*(side / freedom for side in sides)) for name, sides in sums.items() if sides is not None},
        {name: squares / freedom for name, squares in total.items()},
        torch.stack([squares.sum() for squares in total.values()]).sum() / freedom,
        errors,
    )


def _weighted_error(values: Tensor, weights: Tensor) -> Tensor:
    """The standard error of the weighted mean of the values of some steps; NaN for a single step."""
    if len(values) < 2:
        return torch.full_like(values[0], torch.nan)
    share = weights.reshape(-1, *(1,) * (values.ndim - 1))
    mean = (share * values).sum(0) / weights.sum()
    return ((share * (values - mean).square()).sum(0) / (len(values) - 1) / weights.sum()).sqrt()


def coordinates(symmetry: nf.Symmetry, params: dict[str, Tensor]) -> list[Tensor]:
    """A basis of the algebra: one generator for every independent direction."""
    identity = symmetry.identity(params)
    if identity.ndim < 2:
        return [row.reshape(identity.shape) for row in torch.eye(max(1, identity.numel()), dtype=torch.float64)]
    found = []
    for i, j in itertools.combinations_with_replacement(range(len(identity)), 2):
        basis = torch.zeros_like(identity, dtype=torch.float64)
        basis[i, j] += 0.5
        basis[j, i] += 0.5
        found.append(basis)
    return found


def pairing(value: Tensor, x: Tensor) -> Tensor:
    """The value of a charge (or drift) along a generator: the sum of products of coordinates."""
    return (value * x).sum()


def minibatches(count: int, size: int, *, replacement: bool) -> Sequence[tuple[int, ...]]:
    """Every minibatch, all equally likely."""
    if replacement:
        return list(itertools.product(range(count), repeat=size))
    return list(itertools.combinations(range(count), size))
