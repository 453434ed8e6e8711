"""The table of docs/does-the-forecast-hold.md: what figure F12 predicts and measures at full size.

    python benchmarks/forecast_holds.py          runs F12, and writes results/forecast_holds.json (minutes)
    python benchmarks/forecast_holds.py --show   prints the table, and writes it into docs/does-the-forecast-hold.md

`noetherflow reproduce f12` runs the same code, and compares the numbers with the bands of its claims.
"""

import time
from pathlib import Path
from typing import Any

import study
import torch
from machine import environment

from noetherflow.paper import f12_forecast as f12

OUT = Path(__file__).parent / "results" / "forecast_holds.json"
PAGE = Path(__file__).parents[1] / "docs" / "does-the-forecast-hold.md"


def measure() -> dict[str, Any]:
    """All problems."""
    torch.set_num_threads(1)
    config, begin = f12.Config(), time.process_time()
    outcome = f12.run(config)
    seconds = round(time.process_time() - begin, 1)
    claims = [claim.to_json() for claim in f12.claims(config, outcome)]
    problems = [measured.summary() for measured in outcome]
    return {"problems": problems, "claims": claims, "seconds": seconds} | environment([])


def table(results: dict[str, Any]) -> str:
    """Predicted and measured beside each other, and the processor."""
    rows = results["problems"]
    text = _table(
        ("Tr H changes by: predicted", "measured", "sign right", "Tr H at the end: predicted", "measured"),
        {row["problem"]: _of_change(row) for row in rows},
    )
    text += "\n" + _table(
        ("end, predicted / measured", "half of the change after: predicted", "measured", "ratio", "lr / noisy limit"),
        {row["problem"]: _of_time(row) for row in rows},
    )
    return f"{text}\nF12 took {results['seconds']:,.0f} seconds on a core of {results['processor']}.\n"


def _of_change(row: dict[str, Any]) -> list[str]:
    predicted, end = ("cannot be told", "-")
    if row["told"]:
        predicted, end = f"× {_number(row['change predicted'], 3)}", _number(row["end predicted"], 1)
        if row["told"] < row["seeds"]:
            predicted += f" ({row['told']} of {row['seeds']} told)"
    sign = f"{row['right']} of {row['sure']}" if row["sure"] else "-"
    return [predicted, f"× {_number(row['change measured'], 3)}", sign, end, _number(row["end measured"], 1)]


def _of_time(row: dict[str, Any]) -> list[str]:
    measured, share = _steps(row["half measured"]), f"{row['share']:.0%}"
    if not row["told"]:
        return ["-", "-", measured, "-", share]
    predicted = row["half predicted"]
    return [
        f"{row['end predicted'][0] / row['end measured'][0]:.2f}",
        _steps(predicted),
        measured,
        f"{predicted[0] / row['half measured'][0]:.2f}" if predicted[0] and row["half measured"][0] else "-",
        share,
    ]


def _table(heads: tuple[str, ...], rows: dict[str, list[str]]) -> str:
    lines = ["| problem | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


def _number(value: tuple[float, float], digits: int) -> str:
    """A mean over seeds with its standard error."""
    mean, error = value
    return f"{mean:,.{digits}f} ± {error:,.{digits}f}"


def _steps(value: tuple[float | None, float | None]) -> str:
    """A number of steps with its error; a number that is not known is None."""
    mean, error = value
    if mean is None:
        return "-"
    return f"{mean:,.0f}" + ("" if error is None else f" ± {error:,.0f}") + " steps"


if __name__ == "__main__":
    study.run(__doc__, OUT, PAGE, measure, table)
