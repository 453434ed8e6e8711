"""Time and floating-point operations of `nf.equilibrate`, beside SGD on the way to the same equilibrium.

    python benchmarks/equilibrium.py           fifteen minutes; writes benchmarks/results/equilibrium.json
    python benchmarks/equilibrium.py --show    prints the tables, and writes them into docs/benchmarks.md

Three models in float64, each as it is built and again after training until its loss is flat. SGD starts from the model
that is given to `equilibrate`, with the settings that are given to `equilibrate`, and has a budget of steps. The drift
of SGD is the relative drift of its charges at the point where SGD is, measured over all examples; that point moves in
every direction, while `equilibrate` keeps the function. The measurements of that drift are not timed.

A round is a call of `equilibrate` and then a part of the steps of SGD, so that a change of the machine's load affects
both alike. Operations are those of `torch.utils.flop_counter`, which counts products of matrices only; loops that numba
compiles are not seen. `examples` counts the gradients of examples: of all passes and of the standard errors, and of all
steps of SGD.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import machine
import torch
import transformers
from at_rest import measure, show
from at_rest.cases import CASES

from noetherflow import _files

OUT = Path(__file__).parent / "results" / "equilibrium.json"
STATES = ("as built", "trained")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--states", nargs="+", default=list(STATES), choices=list(STATES))
    parser.add_argument("--share", type=float, default=1.0, help="share of the budgets of SGD and of training")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--show", action="store_true", help="print the tables and write them into docs/benchmarks.md")
    given = parser.parse_args(arguments)
    if given.show:
        show.write(given.out)
        return
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    about = machine.environment(["transformers"]) | {"threads": torch.get_num_threads()}
    settings = {"environment": about, "rounds": given.rounds, "share of the budgets": given.share}
    for name in given.models:
        for state in given.states:
            row = measure.compare(name, state, given.rounds, given.seed, given.share)
            save(given.out, settings, row)
            print(f"{name}, {state}: done", flush=True)
    print(show.tables(json.loads(given.out.read_text("utf-8"))))


def save(path: Path, settings: dict[str, Any], row: dict[str, Any]) -> None:
    """Write a row into the file, which keeps the other rows that were measured with these settings."""
    kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
    rows = kept["rows"] if {key: value for key, value in kept.items() if key != "rows"} == settings else []
    by_title = {show.title(other): other for other in (*rows, row)}
    order = [f"{name}, {state}" for name in CASES for state in STATES]
    _files.write_json(path, settings | {"rows": [by_title[title] for title in order if title in by_title]})


if __name__ == "__main__":
    main()
