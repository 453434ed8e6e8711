"""The records of a simulation, and their files."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from noetherflow._errors import SettingsError
from noetherflow._extras import require
from noetherflow._files import atomic

_METADATA = "noetherflow"
# Groups of quantities by name: those of every record, and those of the end.
_RECORDED = ("charges", "observables")
_FINAL = ("params", "second_moments")


@final
@dataclass(frozen=True)
class Trajectory:
    """Records of R replicas at T steps of a simulation.

    Args:
        steps: The recorded steps, int64, shape (T,). A record is made before the update of its step.
        loss: Mean loss of the examples of the recorded step, shape (T, R).
        charges: Charge by name of the symmetry, shape (T, R, *charge).
        observables: Observable by name, shape (T, R, *observable).
        params: Parameters at the end by name, shape (R, *parameter).
        second_moments: Bias-corrected averages of squares of gradients at the end by name, shape (R, *parameter), as
            AdamW keeps them; empty for all other dynamics.

    Examples:
        >>> import torch, tempfile, pathlib, noetherflow as nf
        >>> net, loss = torch.nn.Linear(2, 1), lambda model, x: model(x).square().sum(1)
        >>> trajectory = nf.simulate(net, loss, torch.randn(16, 2), nf.SGD(lr=0.1, batch_size=4), steps=10, replicas=3)
        >>> trajectory.loss.shape
        torch.Size([11, 3])
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.npz"
        >>> trajectory.save(path)
        >>> torch.equal(nf.Trajectory.load(path).loss, trajectory.loss)
        True
    """

    steps: Tensor
    loss: Tensor
    charges: dict[str, Tensor] = field(default_factory=dict)
    observables: dict[str, Tensor] = field(default_factory=dict)
    params: dict[str, Tensor] = field(default_factory=dict, repr=False)
    second_moments: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def diverged(self) -> Tensor:
        """Whether a replica ended with a parameter that is not finite; bool, shape (R,)."""
        finite = [torch.isfinite(stack).reshape(len(stack), -1).all(1) for stack in self.params.values()]
        return ~torch.stack(finite).all(0)

    def save(self, path: str | Path) -> None:
        """Write the trajectory to a file, completely or not at all.

        Args:
            path: A file `*.npz` with an array per quantity, or `*.parquet` with a row per record and replica. The final
                parameters and second moments are columns that are empty in all rows but those of the last record.

        Raises:
            SettingsError: If the path has a different ending.
            MissingExtraError: For `.parquet`, if pyarrow is not installed.
        """
        path = Path(path)
        writer = {".npz": self._save_npz, ".parquet": self._save_parquet}.get(path.suffix)
        if writer is None:
            raise SettingsError(f"a trajectory is saved as .npz or .parquet, got {path.name!r}")
        with atomic(path) as temporary:
            writer(temporary)

    @classmethod
    def load(cls, path: str | Path) -> "Trajectory":
        """Read a trajectory that `save` wrote.

        Args:
            path: A file `*.npz` or `*.parquet`.

        Returns:
            The trajectory, with equal numbers, dtypes and shapes.

        Raises:
            SettingsError: If the path has a different ending.
            MissingExtraError: For `.parquet`, if pyarrow is not installed.
        """
        path = Path(path)
        reader = {".npz": _load_npz, ".parquet": _load_parquet}.get(path.suffix)
        if reader is None:
            raise SettingsError(f"a trajectory is saved as .npz or .parquet, got {path.name!r}")
        arrays = {key: torch.from_numpy(np.array(array)) for key, array in reader(path).items()}
        groups: dict[str, dict[str, Tensor]] = {kind: {} for kind in (*_RECORDED, *_FINAL)}
        for key, tensor in arrays.items():
            kind, slash, name = key.partition("/")
            if slash:
                groups[kind][name] = tensor
        return cls(arrays["steps"], arrays["loss"], **groups)

    def _arrays(self) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        """Every quantity with a key: `steps`, `loss`, or `group/name`."""
        yield "steps", self.steps.numpy()
        yield "loss", self.loss.numpy()
        for kind in (*_RECORDED, *_FINAL):
            for name, tensor in getattr(self, kind).items():
                yield f"{kind}/{name}", tensor.cpu().numpy()

    def _save_npz(self, path: Path) -> None:
        """Write one compressed array per quantity."""
        with path.open("wb") as file:
            arrays: dict[str, Any] = dict(self._arrays())
            np.savez_compressed(file, **arrays)

    def _save_parquet(self, path: Path) -> None:
        """Write a table of T * R rows; cells that are tensors are flat lists, and the metadata give their shapes."""
        pa, pq = _arrow()
        records, replicas = self.loss.shape
        columns: dict[str, Any] = {
            "steps": np.repeat(self.steps.numpy(), replicas),
            "replica": np.tile(np.arange(replicas), records),
        }
        shapes: dict[str, list[int]] = {}
        for key, array in self._arrays():
            if key == "steps":
                continue
            recorded = not _is_final(key)
            shapes[key] = list(array.shape[2 if recorded else 1 :])
            cells = array.reshape(-1, *shapes[key])
            if not recorded:
                # Known at the end alone, so that the rows of all earlier records are empty.
                rows = [None] * ((records - 1) * replicas) + [cell.ravel() for cell in cells]
                columns[key] = pa.array(rows, type=pa.list_(pa.from_numpy_dtype(array.dtype)))
            elif shapes[key]:
                columns[key] = pa.FixedSizeListArray.from_arrays(pa.array(cells.ravel()), int(np.prod(shapes[key])))
            else:
                columns[key] = pa.array(cells)
        table = pa.table(columns).replace_schema_metadata(
            {_METADATA: json.dumps({"shapes": shapes, "replicas": replicas})}
        )
        pq.write_table(table, path)


def _is_final(key: str) -> bool:
    """Whether a quantity is known at the end alone."""
    return key.partition("/")[0] in _FINAL


def _arrow() -> tuple[Any, Any]:
    """The modules `pyarrow` and `pyarrow.parquet`; raises `MissingExtraError` if the package is not installed."""
    require("paper", "pyarrow", purpose="a trajectory in a .parquet file")
    import pyarrow
    import pyarrow.parquet

    return pyarrow, pyarrow.parquet


def _load_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of an npz file by key."""
    with np.load(path) as archive:
        return {key: archive[key] for key in archive.files}


def _load_parquet(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of a parquet file by key, in the shapes that its metadata give."""
    _, pq = _arrow()
    table = pq.read_table(path)
    layout = json.loads(table.schema.metadata[_METADATA.encode()])
    replicas = layout["replicas"]
    arrays = {"steps": table["steps"].to_numpy()[::replicas]}
    for key, shape in layout["shapes"].items():
        column = table[key].combine_chunks().drop_null()
        if shape:
            column = column.flatten()
        rows = (replicas,) if _is_final(key) else (len(arrays["steps"]), replicas)
        arrays[key] = column.to_numpy(zero_copy_only=False).reshape(*rows, *shape)
    return arrays
