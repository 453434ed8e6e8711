"""The names of symmetries: the place in the model, and the layers between which a symmetry acts."""

from collections import Counter
from collections.abc import Iterable, Sequence

from noetherflow.detect.families import Candidate
from noetherflow.symmetry import Action, Axis


def named(candidates: Sequence[Candidate]) -> list[str]:
    """A name for each candidate, such as `layers.0.attn: V-O head 3` or `0 -> 2`."""
    bare = [_bare(candidate) for candidate in candidates]
    total = Counter(bare)
    seen: Counter[str] = Counter()
    names = []
    for candidate, name in zip(candidates, bare, strict=True):
        number = seen[name]
        seen[name] += 1
        if total[name] == 1:
            names.append(name)
        else:
            names.append(f"{name} head {number}" if candidate.words else f"{name} [{number}]")
    return names


def _bare(candidate: Candidate) -> str:
    symmetry = candidate.symmetry
    plus, minus = _labels(symmetry.plus), _labels(symmetry.minus)
    parts = [label.split(".") for label in (*plus, *minus)]
    shared = 0
    while all(len(part) > shared + 1 for part in parts) and len({part[shared] for part in parts}) == 1:
        shared += 1
    prefix = ".".join(parts[0][:shared])
    short = [[".".join(label.split(".")[shared:]) for label in side] for side in (plus, minus)]
    if candidate.words:
        between = candidate.words[0] + ("" if symmetry.action is Action.MIXES_ROWS else " rows")
    elif minus:
        between = f"{_listed(short[0])} -> {_listed(short[1])}"
    else:
        between = f"scale of {_listed(short[0])}"
    return f"{prefix}: {between}" if prefix else between


def _labels(axes: Iterable[Axis]) -> list[str]:
    """The modules behind some axes; the parameter itself where its name says more than weight or bias."""
    labels = []
    for axis in axes:
        module, _, parameter = axis.name.rpartition(".")
        labels.append(module if module and parameter in {"weight", "bias"} else axis.name)
    return list(dict.fromkeys(labels))


def _listed(labels: Sequence[str]) -> str:
    return " + ".join(labels) if len(labels) <= 3 else f"{labels[0]} + ... ({len(labels)})"
