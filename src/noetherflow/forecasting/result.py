"""The result of `forecast`: as values, as a table, as a file."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from torch import Tensor

from noetherflow import _files, _store, _versions
from noetherflow._table import Column, Table, html_of, steps, text_of
from noetherflow.equilibrium.result import Status
from noetherflow.forecasting.estimate import Change, Estimate
from noetherflow.forecasting.learning import Learning
from noetherflow.forecasting.norms import Norm
from noetherflow.forecasting.plain import plain
from noetherflow.forecasting.said import ending, once, too_wide
from noetherflow.forecasting.schedule import Warmup
from noetherflow.optimizers import Optimizer

# Blocks that the table lists, those with the largest traces; `Forecast.blocks` has all.
_LISTED = 12


@final
@dataclass(frozen=True)
class Forecast:
    r"""What becomes of the sharpness of a model on the way to its noise equilibrium.

    A `Change` has an `Estimate` `now`, `then` (at the equilibrium) and for the `ratio` of both. An `Estimate` has a
    `value`, NaN if it cannot be told with the reason in `why`, the standard error `error` of the method on the data
    that was given, and the standard error `sampling` for another sample of the data. H is the Hessian of the mean loss
    without weight decay.

    Args:
        trace: Tr H.
        blocks: Tr H of the block of each parameter.
        largest: The largest eigenvalue of H.
        critical: The critical sharpness 2 / lr_c, with the largest step lr_c along the update that does not raise the
            loss.
        stable_step: The largest stable learning rate without noise.
        noisy_step: The largest learning rate at which the mean square of a displacement along the sharpest direction
            shrinks in a step.
        half_steps: The number of steps after which half of the change of Tr H is made.
        learning: How far the model still learns in that time. Where learning may change Tr H as much as the motion
            along the orbit, the ratio of `trace` and `half_steps` cannot be told, and `trace.then` is the trace of H of
            the present function at its equilibrium.
        warmup: Whether a warmup is needed, and its schedule.
        norms: Norms of scale-invariant weights, by symmetry.
        exact: Whether the traces are exact on the data, not estimates from random vectors.
        status: How the search for the equilibrium ended.
        settings: The settings of the optimizer.
        examples: The number of examples.
        assumptions: What the numbers stand on, in sentences.
        notes: What was left out or done in another way, in sentences.

    Examples:
        >>> import torch, noetherflow as nf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> batches = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(9)]
        >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1)
        >>> forecast = nf.forecast(net, loss, batches, nf.SGD(lr=0.1, batch_size=8))
        >>> forecast.exact, forecast.trace.now.error
        (True, 0.0)
        >>> sorted(forecast.blocks)
        ['0.bias', '0.weight', '2.bias', '2.weight']
    """

    trace: Change
    blocks: dict[str, Change]
    largest: Change
    critical: Change
    stable_step: Change
    noisy_step: Change
    half_steps: Estimate
    learning: Learning
    warmup: Warmup
    norms: dict[str, Norm] = field(repr=False)
    exact: bool
    status: Status
    settings: Optimizer
    examples: int
    assumptions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The forecast of the sharpness in a sentence."""
        ratio = self.trace.ratio
        if not ratio.known:
            return f"What becomes of the sharpness cannot be told: {ratio.why}."
        error = f" +- {ratio.total:.2g}" if not math.isnan(ratio.total) else ""
        if not math.isnan(ratio.total) and abs(ratio.value - 1) <= 2 * ratio.total:
            return f"The sharpness stays as it is within two errors: Tr H x {ratio.value:.3g}{error}."
        verb = "sharpens" if ratio.value > 1 else "flattens"
        half = self.half_steps
        when = f"half of it within {steps(half.value)} steps" if half.known else f"when cannot be told: {half.why}"
        return f"The model {verb}: Tr H x {ratio.value:.3g}{error}, {when}."

    def to_json(self) -> dict[str, Any]:
        """All numbers, settings, sentences and versions as JSON types; NaN and infinities become null."""
        content = {"sentence": self.sentence} | plain(self) | {"versions": _versions.versions()}
        return _files.finite(content)

    def save_json(self, path: str | Path) -> None:
        """Write `to_json()` to a file, completely or not at all."""
        _files.write_json(path, self.to_json())

    def save(self, path: str | Path) -> None:
        """Write the forecast to a file (safetensors and JSON, no pickle), completely or not at all.

        Args:
            path: The file, by convention `*.safetensors`.

        Raises:
            FileError: If the file cannot be written.
        """
        _store.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> "Forecast":
        """Read a forecast that `save` wrote, equal to the last bit.

        Args:
            path: The file.

        Returns:
            The forecast.

        Raises:
            FileError: If the file is missing, damaged, or holds a result of a different class.
        """
        return _store.load(cls, path)

    def __str__(self) -> str:
        return text_of(_tables(self))

    def _repr_html_(self) -> str:
        return html_of(_tables(self))


def numbers_of(forecast: Forecast) -> tuple[tuple[str, Change], ...]:
    """The numbers of the complete model with their labels."""
    return (
        ("Tr H", forecast.trace),
        ("largest eigenvalue of H", forecast.largest),
        ("critical sharpness 2 / lr_c", forecast.critical),
        ("largest stable step, no noise", forecast.stable_step),
        ("largest stable step, with noise", forecast.noisy_step),
    )


def reasons_of(forecast: Forecast) -> tuple[str, ...]:
    """Why numbers cannot be told, each reason once."""
    every = [estimate for _, change in numbers_of(forecast) for estimate in change]
    every += [forecast.half_steps, forecast.learning.trace]
    return tuple(dict.fromkeys(estimate.why for estimate in every if not estimate.known))


def blocks_told(forecast: Forecast) -> bool:
    """Whether the trace of a block is known."""
    return any(change.now.known for change in forecast.blocks.values())


def ranked(forecast: Forecast) -> list[tuple[str, Change]]:
    """The traces of the blocks, the largest first; those that cannot be told at the end."""
    return sorted(forecast.blocks.items(), key=lambda item: -abs(item[1].now.value) if item[1].now.known else 0.0)


def blocks_title(forecast: Forecast) -> str:
    """What the traces of the blocks are."""
    return "Tr H by parameter, " + ("exact on these examples" if forecast.exact else "from random vectors")


def _tables(forecast: Forecast) -> tuple[Table, ...]:
    """The numbers now and at the equilibrium; the blocks; the norms; the sentences."""
    name = type(forecast.settings).__name__
    numbers = numbers_of(forecast)
    columns = (Column("number", folds=True), *(Column(h, right=True) for h in ("now", "equilibrium", "ratio")))
    rows = tuple((label, str(c.now), str(c.then), str(c.ratio)) for label, c in numbers)
    reasons = {c.then.why or c.now.why or c.ratio.why: None for _, c in numbers}
    notes = [*(f"cannot be told: {why}" for why in reasons if why), *too_wide(numbers)]
    tables = [
        Table(f"Forecast under {name} ({forecast.examples} examples)", columns, rows, tuple(notes)),
        *([_of_blocks(forecast, columns)] if blocks_told(forecast) else []),
    ]
    if forecast.norms:
        tables.append(norms_table(forecast.norms))
    half = forecast.half_steps
    lines = (
        ("sharpness", forecast.sentence),
        ("half time", f"{half} steps" if half.known else f"{half}: {half.why}"),
        ("warmup", str(forecast.warmup)),
        ("equilibrium", ending(forecast.status)),
        *(("assumes" if k == 0 else "", text) for k, text in enumerate(forecast.assumptions)),
    )
    given = [why for why in reasons if why]
    texts = once(once((text for _, text in lines), given, given=True), reasons_of(forecast))
    told = tuple((label, text) for (label, _), text in zip(lines, texts, strict=True))
    tables.append(Table("", (Column(""), Column("", folds=True)), told, forecast.notes))
    return tuple(tables)


def _of_blocks(forecast: Forecast, columns: tuple[Column, ...]) -> Table:
    """The blocks with the largest traces."""
    largest = ranked(forecast)[:_LISTED]
    more = len(forecast.blocks) - len(largest)
    notes = (f"{more} more parameters have smaller traces",) if more else ()
    return Table(
        blocks_title(forecast), columns, tuple((n, str(c.now), str(c.then), str(c.ratio)) for n, c in largest), notes
    )


def norms_table(norms: dict[str, Norm]) -> Table:
    """Scale-invariant weights: medians over rows."""

    def median(values: Tensor) -> float:
        return float(values.flatten().median())

    columns = (
        Column("scale-invariant", folds=True),
        *(Column(h, right=True) for h in ("norm", "at rest", "error", "effective lr", "at rest", "steps")),
    )
    rows = (
        (
            name,
            f"{median(norm.now):.4g}",
            f"{median(norm.then):.4g}",
            "-" if math.isnan(median(norm.error)) else f"{median(norm.error):.2g}",
            f"{median(norm.lr_now):.3g}",
            f"{median(norm.lr_then):.3g}",
            steps(median(norm.steps)),
        )
        for name, norm in norms.items()
    )
    note = "medians over rows; steps until a norm is within 5 % of its equilibrium"
    return Table("Weights in front of a normalisation", columns, tuple(rows), (note,))
