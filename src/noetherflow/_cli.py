"""The command line: `noetherflow symmetries FILE.py`, `analyze FILE.py` and `reproduce [FIGURES]`."""

import contextlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from torch import nn

from noetherflow import _files
from noetherflow._analyze import analyze as run_analysis
from noetherflow._analyze import rebalanced_copy
from noetherflow._batch import peek
from noetherflow._errors import MissingExtraError, NoetherflowError, UserFileError
from noetherflow._optimizers import SGD
from noetherflow._progress import track
from noetherflow.detect import explain

if TYPE_CHECKING:
    from noetherflow.paper.runner import Ending

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Parameter symmetry and gradient noise of SGD.")
_console = Console()
_errors = Console(stderr=True)


@app.callback()
def main() -> None:
    """Parameter symmetry and gradient noise of SGD."""


@app.command()
def analyze(
    file: Annotated[
        Path,
        typer.Argument(help="A Python file with build() -> (model, loss, loader, sgd), or with symmetries after sgd."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the JSON file and the figure.")] = Path("results"),
    save: Annotated[Path | None, typer.Option(help="Write the rebalanced weights to this .safetensors file.")] = None,
) -> None:
    """Verify the symmetries of a model, measure their gradient noise, and compute their equilibrium under SGD."""
    try:
        if save is not None and save.suffix != ".safetensors":
            raise UserFileError(f"--save writes safetensors, so the file must end in .safetensors, got {save}")
        model, loss, loader, sgd, declared = load_build(file)
        first, loader = peek(loader)
        analysis = run_analysis(model, loss, loader, sgd, declared)
        from noetherflow.report import figure

        typer.echo(str(analysis))
        analysis.save_json(out / f"{file.stem}.json")
        written = [out / f"{file.stem}.json"]
        try:
            written += figure.save(analysis, out / file.stem)
        except MissingExtraError as error:
            _errors.print(f"No picture: {error}", markup=False, highlight=False, soft_wrap=True)
        if save is not None:
            save_weights(rebalanced_copy(model, analysis, loss, first), save)
            written.append(save)
    except NoetherflowError as error:
        _fail(error)
    _console.print("Written: " + ", ".join(map(str, written)), soft_wrap=True)


@app.command()
def symmetries(
    file: Annotated[Path, typer.Argument(help="A Python file with build() -> (model, loss, loader, ..., sgd).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    approximate: Annotated[
        bool,
        typer.Option("--approximate", help="Find also symmetries that the eps of a normalisation breaks slightly."),
    ] = False,
) -> None:
    """Find the symmetries of a model, verify each symmetry, and name the axes on which no symmetry acts."""
    try:
        model, loss, loader, _, _ = load_build(file)
        explanation = explain(model, loss, peek(loader)[0], approximate=approximate)
    except NoetherflowError as error:
        _fail(error)
    if as_json:
        typer.echo(json.dumps(explanation.to_json(), indent=2))
        return
    typer.echo(str(explanation))
    if explanation.rejected:
        _errors.print(f"[red]{len(explanation.rejected)} candidates were rejected: they change a loss[/red]")


@app.command()
def reproduce(
    figures: Annotated[list[str] | None, typer.Argument(help="The figures, such as f1 f2; by default all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Reduced sizes, which take a fraction of the time.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of all random numbers.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Override a setting, for all figures that have it or as f1.NAME."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results"),
    force: Annotated[
        bool, typer.Option("--force", help="Repeat experiments that have results of the same settings and code.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Number of experiments that run at a time.")] = 1,
) -> None:
    """Run the experiments of the paper and check every claim; results of earlier runs are kept."""
    try:
        from noetherflow.paper import experiment, results, runner

        chosen = list(dict.fromkeys(experiment.choose(figures or [])))
        configs = experiment.configure(chosen, quick=quick, seed=seed, overrides=settings or [])
    except NoetherflowError as error:
        _fail(error)
    endings: dict[str, Ending] = {}
    try:
        with contextlib.closing(runner.run(configs, out, quick=quick, force=force, jobs=jobs)) as coming:
            for ending in track(coming, "experiments", total=len(chosen)):
                endings[ending.name] = ending
                # click writes to the console of the progress bar, above the bar; a second console would write over it.
                typer.echo(f"[{len(endings)}/{len(chosen)}] {_line(ending, results.verdict)}", err=True)
    except KeyboardInterrupt:
        _errors.print(f"Stopped. {len(endings)} of {len(chosen)} are finished; repeat the command to run the rest.")
        raise typer.Exit(130) from None
    done = [result for name in chosen if (result := endings[name].result) is not None]
    unfinished = [name for name in chosen if endings[name].result is None]
    _console.print(results.table(done))
    _console.print(f"Results, with settings and pictures: {out}", soft_wrap=True)
    _console.print(f"All results on a page: {out / 'report.html'}", soft_wrap=True)
    failed = sum(not claim.holds for result in done for claim in result.claims)
    if failed:
        _errors.print(f"[red]{failed} claims do not hold[/red]")
    if unfinished:
        _errors.print(f"[red]did not finish: {', '.join(unfinished)}[/red]")
    if failed or unfinished:
        raise typer.Exit(1)


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the weights of a model as safetensors, completely or not at all; tied weights are written once."""
    from safetensors.torch import save_model

    with _files.atomic(path) as temporary:
        save_model(model, str(temporary))


def _line(ending: "Ending", verdict: Callable[[Any], str]) -> str:
    """The outcome of an experiment on a line, after the traceback if there is one."""
    if ending.result is None:
        return f"{ending.trace}{ending.name}: {typer.style(ending.error, fg='red')}"
    cached = ", kept from an earlier run" if ending.cached else ""
    return f"{typer.style(ending.name, bold=True)} {ending.result.title}: {verdict(ending.result)}{cached}"


def _fail(error: NoetherflowError) -> None:
    """Print an error that a user can correct, and exit with code 2."""
    _errors.print(f"[red]{type(error).__name__}[/red]: ", end="")
    _errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)
