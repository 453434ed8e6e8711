"""What `forecast` predicts of the sharpness, beside what training does.

    python benchmarks/forecast_holds.py          measures, and writes results/forecast_holds.json (minutes)
    python benchmarks/forecast_holds.py --show   prints the table, and writes it into docs/does-the-forecast-hold.md

Every problem is trained from 8 seeds with the optimizer that the forecast was given. The sharpness is Tr H of the mean
loss, from closed forms that share no code with the forecast: that of two linear layers, and for the digits the trace
of the Gauss-Newton matrix, which is Tr H for a network that is piecewise linear in every single parameter.
The time to half is where the mean over seeds of Tr H / Tr H(0) has made half of its change; its error is from leaving
out a seed at a time.
"""

import time
from pathlib import Path
from typing import Any

import study
import torch
from holds.case import summary
from holds.digits import of_digits
from holds.linear import of_f3, of_f4
from machine import environment

OUT = Path(__file__).parent / "results" / "forecast_holds.json"
PAGE = Path(__file__).parents[1] / "docs" / "does-the-forecast-hold.md"


def measure() -> dict[str, Any]:
    """All problems."""
    torch.set_num_threads(1)
    begin = time.process_time()
    cases = [*of_f3(), *of_f4(), *of_digits()]
    return {"cases": cases, "seconds": round(time.process_time() - begin, 1)} | environment([])


def table(results: dict[str, Any]) -> str:
    """Predicted and measured beside each other, and the processor."""
    said = [summary(result) for result in results["cases"]]
    heads = ("Tr H changes by: predicted", "measured", "sign right", "Tr H at the end: predicted", "measured")
    lines = ["| problem | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for row in said:
        right, sure = row["sign"]
        cells = [
            row["case"],
            *(f"× {_number(row[key], 3)}" for key in ("change predicted", "change measured")),
            f"{right} of {sure}" if sure else "not sure",
            *(_number(row[key], 1) for key in ("end predicted", "end measured")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    heads = (
        "end, predicted / measured",
        "half of the change after: predicted",
        "measured",
        "predicted / measured",
        "lr / noisy limit",
    )
    lines += ["", "| problem | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for row in said:
        cells = [
            row["case"],
            _number(row["end ratio"], 2),
            *(f"{_number(row[key], 0)} steps" for key in ("half predicted", "half measured")),
            f"{row['half predicted'][0] / row['half measured'][0]:.2f}",
            f"{row['share']:.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"These runs took {results['seconds']:,.0f} seconds on a core of {results['processor']}."]
    return "\n".join(lines) + "\n"


def _number(value: tuple[float, float], digits: int) -> str:
    """A mean over seeds with its standard error."""
    mean, error = value
    return f"{mean:,.{digits}f} ± {error:,.{digits}f}"


if __name__ == "__main__":
    study.run(__doc__, OUT, PAGE, measure, table)
