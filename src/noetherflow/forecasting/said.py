"""What a forecast says in sentences: each reason once, the end of the search, and errors that are too large."""

from collections.abc import Iterable, Sequence

from noetherflow.equilibrium.result import Status
from noetherflow.forecasting.estimate import Change, Estimate

_SEE = "see above"
# Stands for a reason in full; no text holds control characters.
_HOLE = "\x00{}\x00"
# Share of an error from which one of its two parts is named.
_PART = 0.3


def once(texts: Iterable[str], reasons: Iterable[str], *, given: bool = False) -> list[str]:
    """Texts in which a reason stands once; after that, the texts refer to it.

    Args:
        texts: Texts in the order of reading.
        reasons: Reasons that the texts may hold.
        given: Whether the reader has the reasons already.

    Returns:
        The texts.
    """
    # A reason may be a part of another: the longer is looked for first, and a reason in full is left as it is.
    ordered = sorted({reason for reason in reasons if reason}, key=len, reverse=True)
    read = set(ordered) if given else set()
    result = []
    for text in texts:
        kept: list[str] = []
        for reason in ordered:
            if reason in text:
                text = text.replace(reason, _SEE if reason in read else _HOLE.format(len(kept)))
                if reason not in read:
                    kept.append(reason)
        read |= set(kept)
        for number, reason in enumerate(kept):
            text = text.replace(_HOLE.format(number), reason)
        result.append(text)
    return result


def ending(status: Status) -> str:
    """How the search for the equilibrium ended, as a sentence."""
    if status is Status.CONVERGED:
        return "the equilibrium was reached: noise and weight decay balance along every symmetry"
    return status.value


def too_wide(numbers: Sequence[tuple[str, Change]]) -> list[str]:
    """What makes an error smaller that exceeds its number, as sentences."""
    result = []
    for label, change in numbers:
        for where, value in (("now", change.now), ("at the equilibrium", change.then)):
            if value.known and value.total > abs(value.value):
                result.append(f"the error of {label} {where} exceeds the number: {_remedy(value)} make it smaller")
    return result


def _remedy(value: Estimate) -> str:
    parts = {
        "more random vectors (vectors=...)": value.error,
        "more batches, of more examples,": value.sampling,
    }
    return " and ".join(text for text, part in parts.items() if part > _PART * value.total)
