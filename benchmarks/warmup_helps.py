"""Does training need the warmup that `forecast` recommends, and does the warmup help?

    python benchmarks/warmup_helps.py          measures, and writes results/warmup_helps.json (minutes)
    python benchmarks/warmup_helps.py --show   prints the table, and writes it into docs/do-i-need-warmup.md

Every problem is trained from 8 seeds, with the schedule that the forecast of that seed recommends and without, for the
same number of steps, on the same examples. Where the forecast asks for another forecast at the end of its schedule, it
is made there, and the schedules are joined. Where no warmup is recommended, the comparison is a linear warmup from a
tenth of the learning rate.
"""

import time
from pathlib import Path
from typing import Any

import study
import torch
from machine import environment
from warming.case import case, summary
from warming.linear import of_f4
from warming.normalised import of_normalised

OUT = Path(__file__).parent / "results" / "warmup_helps.json"
PAGE = Path(__file__).parents[1] / "docs" / "do-i-need-warmup.md"
# Steps at the learning rate after the longest warmup, and the steps of a linear warmup where none is recommended.
AFTER = {"F4": 20_000, "CNN": 1_500}
RAMP = {"F4": 2_000, "CNN": 500}


def measure() -> dict[str, Any]:
    """All problems."""
    torch.set_num_threads(1)
    begin = time.process_time()
    cases = [
        case(problem, AFTER[kind], ramp=RAMP[kind])
        for kind, problems in (("F4", of_f4()), ("CNN", of_normalised()))
        for problem in problems
    ]
    return {"cases": cases, "seconds": round(time.process_time() - begin, 1)} | environment([])


def table(results: dict[str, Any]) -> str:
    """What was recommended, and how training ended with and without, and the processor."""
    said = [summary(result) for result in results["cases"]]
    heads = ("learning rate", "verdict", "forecasts", "stable step now", "at the equilibrium", "steps of the warmup")
    lines = ["| problem | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for row in said:
        cells = [
            row["case"],
            f"{row['lr']:g}",
            ", ".join(f"{need} {count} of 8" for need, count in row["verdicts"].items()),
            f"{row['forecasts']}",
            *(f"{row[key][0]:.2g}" for key in ("now", "then")),
            f"{row['length'][0]:,.0f}" if row["length"][0] else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    heads = ("steps", "diverged without", "diverged with", "loss without", "loss with", "without - with")
    lines += ["", "| problem | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for row in said:
        cells = [
            row["case"],
            f"{row['steps']:,}",
            *(f"{row[f'diverged {name}']} of 8" for name in ("without", "with")),
            *(_number(row[name]) for name in ("without", "with", "worse")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"These runs took {results['seconds']:,.0f} seconds on a core of {results['processor']}."]
    return "\n".join(lines) + "\n"


def _number(value: tuple[float, float]) -> str:
    """A mean over seeds with its standard error."""
    mean, error = value
    return "-" if mean != mean else f"{mean:.3f} ± {error:.3f}"


if __name__ == "__main__":
    study.run(__doc__, OUT, PAGE, measure, table)
