"""Slow and obvious versions of what the package does fast: loops over examples, and matrices over all parameters."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import noetherflow as nf


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """All entries of all tensors, in the order of names."""
    return torch.cat([tensors[name].reshape(-1) for name in tensors])


def example(batch: Any, index: int) -> Any:
    """A batch of one."""
    x, y = batch
    return x[index : index + 1], y[index : index + 1]


def gradients(model: nn.Module, loss: nf.Loss, batch: Any) -> list[dict[str, Tensor]]:
    """The gradient of every example, by a plain backward pass for each."""
    found = []
    for index in range(len(batch[0])):
        value = loss(model, example(batch, index)).sum()
        parameters = dict(model.named_parameters())
        found.append(dict(zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True)))
    return found


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
    for position, index in enumerate(itertools.product(*map(range, tensor.shape))):
        if start <= index[dim] < stop:
            row, within = divmod(index[dim] - start, axis.repeat)
            yield position, row, (*index[:dim], within, *index[dim + 1 :])


def _coefficient(symmetry: nf.Symmetry, x: Tensor, p: int, q: int) -> float:
    if isinstance(symmetry, nf.MatrixSymmetry):
        return x[p, q].item()
    if p != q:
        return 0.0
    return x[p].item() if isinstance(symmetry, nf.DiagonalSymmetry) else x.item()


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
