"""The generators of given symmetries as matrices, and what they leave out of a discovery."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from noetherflow._params import snapshot
from noetherflow._types import Params
from noetherflow.discover.equations import span, without
from noetherflow.discover.generators import Discovery
from noetherflow.symmetry import Symmetry


def live_generators(discovery: Discovery, symmetries: Iterable[Symmetry], params: nn.Module | Params) -> Tensor:
    """The generators of symmetries, restricted to the directions that gradients have.

    Args:
        discovery: The discovery of the model, which says which directions are dead.
        symmetries: Symmetries of the model.
        params: The model, or its parameters by name.

    Returns:
        A matrix on the parameters of the discovery for every basis element of every symmetry, shape (k, n, n).
    """
    tensors = snapshot(params)
    chosen = {name: tensors[name].cpu() for name in discovery.names}
    matrices = [matrix for symmetry in symmetries for matrix in generator_matrices(symmetry, chosen)]
    size = discovery.dead.shape[1]
    stacked = torch.stack(matrices) if matrices else torch.zeros(0, size, size, dtype=torch.float64)
    live = torch.eye(size, dtype=torch.float64) - discovery.dead.T @ discovery.dead
    return live @ stacked @ live


def beyond(discovery: Discovery, symmetries: Iterable[Symmetry], params: nn.Module | Params) -> Tensor:
    """The symmetric generators of a discovery that given symmetries do not explain.

    Args:
        discovery: All generators of a small model.
        symmetries: Symmetries of the model, such as those of `find_symmetries`.
        params: The model, or its parameters by name.

    Returns:
        An orthonormal basis of the orthogonal complement of the span of the symmetries in the space of the symmetric
        generators, shape (k, n, n).

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(1, 2, bias=False))
        >>> batch = torch.randn(4, 2), torch.randn(4, 2)
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1)
        >>> discovery = nf.discover_generators(net, loss, batch)
        >>> beyond(discovery, [], net).shape, beyond(discovery, discovery.symmetries, net).shape
        (torch.Size([1, 4, 4]), torch.Size([0, 4, 4]))
    """
    explained = live_generators(discovery, symmetries, params).flatten(1)
    symmetric = discovery.symmetric.flatten(1)
    rest = without(symmetric, span(explained @ symmetric.T) @ symmetric)
    return rest.reshape(-1, *discovery.symmetric.shape[1:])


def generator_matrices(symmetry: Symmetry, params: Params) -> Iterator[Tensor]:
    """Every basis element of a symmetry as a matrix on the parameters laid out one after the other, shape (n, n)."""
    sizes = [tensor.numel() for tensor in params.values()]
    for x in basis_of(symmetry.identity(params)):
        columns = []
        for unit in torch.eye(sum(sizes), dtype=torch.float64):
            parts = {
                name: part.reshape(tensor.shape)
                for (name, tensor), part in zip(params.items(), unit.split(sizes), strict=True)
            }
            moved = symmetry.generate(x, parts)
            columns.append(torch.cat([moved.get(name, 0 * part).reshape(-1) for name, part in parts.items()]))
        yield torch.stack(columns, 1)


def basis_of(identity: Tensor) -> Iterator[Tensor]:
    """A basis of the coordinates of a symmetry: numbers, vectors, or symmetric matrices of the identity's shape."""
    for index in range(identity.numel()):
        x = torch.zeros_like(identity).reshape(-1)
        x[index] = 1.0
        x = x.reshape(identity.shape)
        if x.ndim == 2:
            row, column = divmod(index, len(x))
            if row > column:
                continue
            x = (x + x.mT) / 2
        yield x
