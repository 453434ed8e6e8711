"""A program for a process of its own: measures one half of the data of every case and leaves the moments as files.

Called as `python measures_halves.py HALF FOLDER`. It also saves the moments of a symmetry that it defines.
"""

import pickle
import sys
from pathlib import Path
from typing import Any

import torch

import noetherflow as nf
from cases import Case, cases
from toy_symmetry import toy_of

torch.set_num_threads(1)


class Scripted(toy_of()):
    """A symmetry of a class that is `__main__.Scripted` where this file runs."""


def half_of(one: Case, half: int) -> list[Any]:
    """Two batches, of other sizes in the two halves."""
    x, y = (tensor[: 2 * len(tensor) // 3] if half == 0 else tensor[2 * len(tensor) // 3 :] for tensor in one.batch)
    return list(zip(x.split(5), y.split(5), strict=True))


def measure(one: Case, half: int) -> nf.NoiseMoments:
    return nf.estimate_noise(one.model, one.loss, half_of(one, half), one.symmetries, progress=False)


def scripted_moments(one: Case) -> nf.NoiseMoments:
    stack = {name: torch.randn(6, *tensor.shape, dtype=torch.float64) for name, tensor in one.params.items()}
    return nf.NoiseMoments.of(stack, {"mine": Scripted(next(iter(stack)), 0.1)})


if __name__ == "__main__":
    half, folder = int(sys.argv[1]), Path(sys.argv[2])
    for index, one in enumerate(cases()):
        moments = measure(one, half)
        moments.save(folder / f"{index}-{half}.safetensors")
        (folder / f"{index}-{half}.pickle").write_bytes(pickle.dumps(moments))
    scripted_moments(cases()[2]).save(folder / f"scripted-{half}.safetensors")
