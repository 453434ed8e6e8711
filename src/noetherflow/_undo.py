"""The way back from a move: the bits of parameters, and of the state of an optimizer, as they were."""

from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor, nn


@final
class Snapshot:
    """The values of parameters and of the state of an optimizer, which can be written back at any time.

    Args:
        params: The parameters.
        optimizer: The optimizer, or None.
    """

    def __init__(self, params: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer | None) -> None:
        self._optimizer = optimizer
        state = {} if optimizer is None else optimizer.state
        self._state: dict[Any, dict[str, Any]] = {owner: dict(entries) for owner, entries in state.items()}
        held = (entry for entries in self._state.values() for entry in entries.values())
        tensors = [*params, *(entry for entry in held if isinstance(entry, Tensor))]
        self._values = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def restore(self) -> None:
        """Write all values back, and remove entries of the state that did not exist."""
        try:
            self._write()
        except BaseException:
            # Ctrl-C may come here too, and writing a second time does no harm.
            self._write()
            raise

    def _write(self) -> None:
        with torch.no_grad():
            for tensor, value in self._values:
                tensor.copy_(value)
        if self._optimizer is not None:
            # Training may have replaced tensors of the state: the state gets the tensors back that it had.
            self._optimizer.state.clear()
            self._optimizer.state.update({owner: dict(entries) for owner, entries in self._state.items()})


@final
class Rebalanced:
    """What `rebalance_` returns: how far the losses changed, and the way back.

    A call restores every bit of the parameters of the model and of the state of the optimizer that `rebalance_` was
    given, whatever training did since; a second call does nothing. In a `with` statement the restoration comes at the
    end of the block, also after an exception. Buffers (statistics of batches) and the settings of the optimizer (a
    learning rate that a scheduler changed) stay as they are. Several moves are undone in reverse order.

    The object keeps a copy of all parameters and of the state, which is freed by the call.

    Attributes:
        change: The largest relative change of the loss of an example by the move.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)).double()
        >>> batches = [(torch.randn(8, 4).double(), torch.randn(8, 1).double()) for _ in range(9)]
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> noise = nf.estimate_noise(net, loss, batches)
        >>> equilibrium = nf.solve_equilibrium(noise, nf.SGD(lr=0.1, batch_size=8), net)
        >>> before = net[0].weight.detach().clone()
        >>> with nf.rebalance_(net, equilibrium, loss, batches[0]) as moved:
        ...     print(moved.change < 1e-12, torch.equal(net[0].weight, before))
        True False
        >>> torch.equal(net[0].weight, before)
        True
    """

    def __init__(self, change: float, before: Snapshot) -> None:
        self.change = change
        self._before: Snapshot | None = before

    def __call__(self) -> None:
        """Restore the parameters, and the state of the optimizer."""
        if self._before is not None:
            self._before.restore()
            self._before = None

    def __enter__(self) -> "Rebalanced":
        return self

    def __exit__(self, *exception: object) -> None:
        self()

    def __repr__(self) -> str:
        return f"Rebalanced(change={self.change:.2e}{', undone' * (self._before is None)})"
