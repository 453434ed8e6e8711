"""What goes over the wire between the ranks of a process group: who is there, statistics, and sums of gradients."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor

from noetherflow._errors import NoetherflowError, RankError, SettingsError
from noetherflow.noise.buffers import EACH, OF_SUM, Buffers, ModelLayout
from noetherflow.noise.kernels import accumulator, square

# Numbers that go over the wire at a time.
_BUCKET = 2**23
# What a rank says of its step.
_MEASURED, _REFUSED = 0, 1


@final
class Ranks:
    """The ranks of a process group, which put together what each measured in a step.

    Every rank calls `meet`, or raises in `told`, at the end of a step. After `meet`, every rank makes the calls that
    follow in one order, with tensors of one shape.

    Args:
        group: The process group.
        model_layout: What is measured: the same on every rank.
        device: Where what goes over the wire is.

    Raises:
        SettingsError: If this process is not in the group.
    """

    def __init__(self, group: "dist.ProcessGroup", model_layout: ModelLayout, device: torch.device) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise SettingsError("this process is not in the `group` between whose ranks gradients are compared")
        self._device = device
        measured = [(name, tuple(layout.shape), layout.length) for name, layout in model_layout.layouts.items()]
        self._digest = int.from_bytes(hashlib.blake2b(repr(measured).encode(), digest_size=7).digest())

    def meet(self, count: int, examples: int) -> tuple[int, int]:
        """Wait for all ranks.

        Args:
            count: How many gradients of examples or microbatches this rank has.
            examples: How many examples it has.

        Returns:
            These numbers, summed over ranks.

        Raises:
            RankError: If a rank did not come.
            SettingsError: If a rank refused its step, or measures other parameters.
        """
        rows = self._exchange(_MEASURED, count, examples)
        if refused := [rank for rank, row in enumerate(rows) if row[0] == _REFUSED]:
            raise SettingsError(
                f"no rank measures this step, because it could not be measured on rank {_listed(refused)}, whose error "
                "says why. Gradients are what they would have been"
            )
        if others := [rank for rank, row in enumerate(rows) if row[1] != rows[0][1]]:
            raise SettingsError(
                f"rank {_listed(others)} trains other parameters than rank 0 of the group, or measures other "
                "statistics. The ranks of a `group` hold copies of one model, with different examples; the stages of a "
                "pipeline and the parts of a layer under tensor parallelism are measured each with its own group"
            )
        return sum(row[2] for row in rows), sum(row[3] for row in rows)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Let the other ranks know if what runs inside raises: none of them waits, and none measures the step."""
        try:
            yield
        except NoetherflowError:
            self._exchange(_REFUSED, 0, 0)
            raise

    def sums(
        self, params: Mapping[str, Tensor], part: Callable[[str], Tensor], weight: float
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Sum a tensor of each parameter over ranks, in pieces: the same parameters on every rank.

        Args:
            params: The parameters, in the order in which they go over the wire.
            part: The tensor of this rank, by name, in the dtype in which it is summed.
            weight: By what it is multiplied on this rank.

        Yields:
            The name of a parameter, the tensor of this rank, and the weighted sum over ranks.
        """
        for names in _buckets(params):
            parts = [part(name) for name in names]
            totals = [tensor * weight for tensor in parts]
            self._sum_(totals)
            yield from zip(names, parts, totals, strict=True)

    def sum_each(self, buffers: Buffers, params: Mapping[str, Tensor]) -> None:
        """Sum row EACH of all statistics over ranks."""
        self._sum_([buffers.numbers[EACH]])
        squared = {name: params[name] for name in buffers.model_layout.with_entries}
        for names in _buckets(squared):
            # In one dtype: on a rank whose examples do not reach a parameter, it is that of zeros.
            entries = [buffers.buffer(name, torch.float64).entries for name in names]
            rows = [squares[EACH] for squares in entries if squares is not None]
            totals = [row.double() for row in rows]
            self._sum_(totals)
            for row, total in zip(rows, totals, strict=True):
                row.copy_(total)

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Which of some flags are set on any rank."""
        counts = torch.tensor(flags, dtype=torch.int64, device=self._device)
        self._sum_([counts])
        return [count > 0 for count in counts.tolist()]

    def _sum_(self, tensors: Sequence[Tensor]) -> None:
        """Make each tensor the sum of those of all ranks, in one message."""
        if not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with self._together():
            dist.all_reduce(flat, group=self.group)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view(tensor.shape))

    def _exchange(self, state: int, count: int, examples: int) -> list[list[int]]:
        """What every rank says: its state, what it measures, and two numbers."""
        mine = torch.tensor([state, self._digest, count, examples], dtype=torch.int64, device=self._device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        with self._together():
            if dist.get_backend(self.group) == dist.Backend.GLOO:
                # The only collective that names who is missing. torch.distributed.monitored_barrier would wait for half
                # an hour, whatever the timeout of the group; the method, which that function calls, knows it.
                self.group.monitored_barrier(wait_all_ranks=True)  # type: ignore[attr-defined]
            dist.all_gather(everyone, mine, group=self.group)
        return [[int(number) for number in row.tolist()] for row in everyone]

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} of the {self.size} ranks of a group waited for the others at the end of a step, to "
                f"put together what each measured, and not all came: {str(error).splitlines()[0]} Every rank has to go "
                "through the block of every step that is measured; look at the log of the rank that is missing"
            ) from error


def merge_examples(
    ranks: Ranks, buffers: Buffers, params: Mapping[str, Tensor], sums: Mapping[str, Tensor], weight: float
) -> None:
    """Put together the squares of the gradients of single examples: afterwards each rank has those of all.

    Args:
        ranks: The ranks.
        buffers: Squares of the gradients of examples in row EACH; on return, those of all ranks, and the squares of
            the sum over all examples in row OF_SUM, both as if each gradient had the coefficient 1.
        params: The parameters.
        sums: The sum of the gradients of the examples of this rank; no entry for what no gradient reached.
        weight: The coefficient of an example's gradient on this rank.
    """
    for statistics in (buffers.numbers, *buffers.entries.values()):
        statistics[EACH] *= weight**-2
        statistics[OF_SUM] = 0.0

    def part(name: str) -> Tensor:
        kind = accumulator(params[name])
        return sums[name].to(kind) if name in sums else torch.zeros_like(params[name], dtype=kind, requires_grad=False)

    for name, _, total in ranks.sums(params, part, 1 / weight):
        square(total.to(buffers.numbers.device), buffers.buffer(name, torch.float64), OF_SUM)
    ranks.sum_each(buffers, params)


def _buckets(params: Mapping[str, Tensor]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, parameter in params.items():
        if names and size + parameter.numel() > _BUCKET:
            yield names
            names, size = [], 0
        names.append(name)
        size += parameter.numel()
    if names:
        yield names


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
