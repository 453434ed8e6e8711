"""The noise scale of every part of a model, plain and in the metric of the optimizer, averaged over steps."""

from collections.abc import Collection, Mapping
from typing import Any, final

import torch

from noetherflow._errors import SettingsError
from noetherflow.noise.step import StepNoise
from noetherflow.watching.estimate import ScaleEstimate
from noetherflow.watching.pair_average import PairAverage
from noetherflow.watching.parts import Parts


@final
class ScaleAverages:
    """Traces and squared norms of single steps, averaged separately.

    Args:
        parts: Of which the noise scale is told.
        window: How many steps an average is worth at most.
        confidence: Of the intervals.
        adaptive: Whether there are averages in the metric of the optimizer, too.
    """

    def __init__(self, parts: Parts, window: float, confidence: float, *, adaptive: bool) -> None:
        self.parts, self._confidence = parts, confidence
        self._averages = {False: PairAverage(len(parts), window)}
        if adaptive:
            self._averages[True] = PairAverage(len(parts), window)
        self._steps = dict.fromkeys(self._averages, 0)

    @property
    def adaptive(self) -> bool:
        """Whether there are averages in the metric of the optimizer, too."""
        return True in self._averages

    def add(self, step: StepNoise, left_out: Collection[str]) -> None:
        """Take what a step says.

        Args:
            step: The noise and the mean gradient of the step, also in the metric of the optimizer if it is weighted.
            left_out: Parameters without a measurement.
        """
        kept = torch.tensor([name not in left_out for name in step.names])
        for adapted in (False, True) if step.weighted else (False,):
            pairs = torch.stack([step.trace(weighted=adapted), step.norm_sq(weighted=adapted)], -1)
            self._averages[adapted].add(self.parts.sums(torch.where(kept[:, None], pairs, 0.0)))
            self._steps[adapted] += 1

    def estimates(self, *, adapted: bool = False) -> dict[str, ScaleEstimate]:
        """The noise scale of every part of which a gradient was measured; of none before the first step."""
        average = self._averages.get(adapted)
        if average is None or not self._steps[adapted]:
            return {}
        intervals = average.intervals(self._confidence)
        return {
            name: ScaleEstimate(float(trace), float(norm_sq), low, high, self._steps[adapted])
            for name, (trace, norm_sq), (low, high) in zip(self.parts.keys, average.mean, intervals, strict=True)
            if not name or trace or norm_sq
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that later estimates depend on, as numbers and tensors."""
        averages = [average.state_dict() for average in self._averages.values()]
        return {"parts": self.parts.keys, "steps": list(self._steps.values()), "averages": averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the averages stood that `state_dict` describes."""
        if state["parts"] != self.parts.keys or len(state["averages"]) != len(self._averages):
            raise SettingsError(
                f"the saved noise scale is that of {len(state['parts'])} parts of a model, {state['parts'][1:4]} and "
                f"so on, in {len(state['averages'])} metrics; here there are {len(self.parts)}, "
                f"{self.parts.keys[1:4]} and so on, in {len(self._averages)} metrics: load it for the model and the "
                "kind of optimizer of the run that was saved"
            )
        for average, saved in zip(self._averages.values(), state["averages"], strict=True):
            average.load_state_dict(saved)
        self._steps = dict(zip(self._averages, state["steps"], strict=True))


def metrics_of(estimates: Mapping[str, ScaleEstimate], adapted: Mapping[str, ScaleEstimate]) -> dict[str, float]:
    """Estimates of parts as numbers under the names that loggers show.

    Args:
        estimates: By part; that of all parameters has the empty name.
        adapted: In the metric of the optimizer; of all parameters.

    Returns:
        Numbers by name.
    """
    numbers: dict[str, float] = {}
    if "" in estimates:
        numbers |= {"noise/trace": estimates[""].trace, "grad/norm_sq_unbiased": estimates[""].norm_sq}
    for suffix, several in (("", estimates), ("_preconditioned", adapted)):
        for part, estimate in several.items():
            where = f"/{part}" if part else ""
            ends = ("", estimate.scale), ("_low", estimate.low), ("_high", estimate.high)
            numbers |= {f"noise/scale{suffix}{end}{where}": value for end, value in ends}
    return numbers
