"""The command line: `noetherflow symmetries`, `analyze`, `forecast`, `watch`, `reproduce` and `doctor`."""

import contextlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console

from noetherflow import _cli_outputs, _kept
from noetherflow._analysis import Analysis
from noetherflow._analyze import analyze as run_analysis
from noetherflow._analyze import rebalanced_copy
from noetherflow._batch import hold_out, peek
from noetherflow._cli_options import Dtype, check_options
from noetherflow._doctor import examine
from noetherflow._errors import FileError, NoetherflowError
from noetherflow._explain import explain
from noetherflow._progress import track
from noetherflow._user_file import Built, load_build, sources
from noetherflow._versions import __version__
from noetherflow.forecasting import forecast as run_forecast

if TYPE_CHECKING:
    from noetherflow.paper.runner import Ending

app = typer.Typer(no_args_is_help=True, help="Parameter symmetry and gradient noise.")
_console = Console()
_errors = Console(stderr=True)


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"noetherflow {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Parameter symmetry and gradient noise."""


@app.command()
def analyze(
    file: Annotated[
        Path,
        typer.Argument(
            help="A Python file with build() -> (model, loss, loader, settings), or with symmetries at the end."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the page, the JSON file and the figure.")] = Path("results"),
    rebalance: Annotated[bool, typer.Option("--rebalance", help="Move a copy to equilibrium; with --save.")] = False,
    save: Annotated[
        Path | None, typer.Option(help="Write the rebalanced weights to this .safetensors file; with --rebalance.")
    ] = None,
    holdout: Annotated[
        float | None,
        typer.Option(help="Share of the batches, the last, on which the equilibrium is only checked, such as 0.25."),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="The dtype of losses and gradients.")] = None,
    microbatches: Annotated[
        bool, typer.Option("--microbatches", help="Measure noise between batches, for models with BatchNorm.")
    ] = False,
    max_passes: Annotated[int | None, typer.Option(min=2, help="The largest number of noise measurements.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="The share of a drift that may be left.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Measure again although the model, the data and the code are unchanged.")
    ] = False,
) -> None:
    """Find and verify symmetries, measure their gradient noise, and compute their equilibrium.

    A finished measurement is kept, and used again by a run of the same model, data, options and code.
    """
    options: dict[str, Any] = {"holdout": holdout, "max_passes": max_passes, "tolerance": tolerance}
    options |= {"dtype": None if dtype is None else getattr(torch, dtype), "microbatches": microbatches or None}
    given = {name: value for name, value in options.items() if value is not None}
    try:
        check_options(rebalance, save, given)
        built = load_build(file)
        first, loader = peek(built[2])
        path = out / f"{file.stem}.analysis.safetensors"
        analysis, kept = _analysis(file, path, (*built[:2], loader, *built[3:]), given, force=force)
        typer.echo(str(analysis))
        written = [*_cli_outputs.of_analysis(analysis, out, file.stem, _warn), *kept]
        if save is not None:
            _cli_outputs.save_weights(rebalanced_copy(built[0], analysis, built[1], first), save)
            written.append(save)
    except NoetherflowError as error:
        _fail(error)
    _console.print("Written: " + ", ".join(map(str, written)), soft_wrap=True)


@app.command()
def forecast(
    file: Annotated[Path, typer.Argument(help="A Python file with build(), as for analyze.")],
    out: Annotated[Path, typer.Option(help="Folder for the page and the JSON file.")] = Path("results"),
    save: Annotated[Path | None, typer.Option(help="Write the forecast to this .safetensors file.")] = None,
    vectors: Annotated[int, typer.Option(help="Random vectors for the traces, 4 or more.")] = 32,
    dtype: Annotated[Dtype | None, typer.Option(help="The dtype of losses and gradients.")] = None,
    microbatches: Annotated[
        bool, typer.Option("--microbatches", help="Measure noise between batches, for models with BatchNorm.")
    ] = False,
) -> None:
    """Predict the sharpness at the noise equilibrium, the largest stable steps, and whether warmup is needed."""
    try:
        model, loss, loader, settings, declared = load_build(file)
        precision = None if dtype is None else getattr(torch, dtype)
        result = run_forecast(
            model, loss, loader, settings, declared, vectors=vectors, dtype=precision, microbatches=microbatches
        )
        typer.echo(str(result))
        written = _cli_outputs.of_forecast(result, out, file.stem)
        if save is not None:
            result.save(save)
            written.append(save)
    except NoetherflowError as error:
        _fail(error)
    _console.print("Written: " + ", ".join(map(str, written)), soft_wrap=True, markup=False, highlight=False)


@app.command()
def symmetries(
    file: Annotated[Path, typer.Argument(help="A Python file with build() -> (model, loss, loader, settings).")],
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
def watch(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_DIR",
            help="A folder with metrics.jsonl, metrics.csv (Lightning) or trainer_state.json (Trainer).",
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="The HTML file; by default watch.html in that folder.")] = None,
) -> None:
    """Draw the noise scale, the charges and the distances to equilibrium that a training recorded."""
    from noetherflow.record import read_run
    from noetherflow.report import watch as page
    from noetherflow.report import watch_words

    try:
        run = read_run(folder)
        path = out or folder / "watch.html"
        page.write(path, run)
    except NoetherflowError as error:
        _fail(error)
    typer.echo(watch_words.table(run).text())
    _console.print(f"Written: {path}", soft_wrap=True, markup=False, highlight=False)


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


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Print versions, devices, kernels, threads and extras; the exit code is 1 if something is broken."""
    installation = examine()
    typer.echo(json.dumps(installation.to_json(), indent=2) if as_json else str(installation))
    raise typer.Exit(int(bool(installation.problems)))


def _analysis(
    file: Path, path: Path, built: Built, options: dict[str, Any], *, force: bool
) -> tuple[Analysis, list[Path]]:
    """The analysis of what `build()` returned, kept from an earlier run or computed, and the files written."""
    model, loss, loader, settings, declared = built
    held: list[Any] = []
    batches = list(track(loader, "reading the data")) if iter(loader) is loader else loader
    if "holdout" in options:
        # The noise between microbatches needs two of them.
        least = 2 if "microbatches" in options else 1
        batches, held = hold_out(track(batches, "reading the data"), options["holdout"], least)
    measured = itertools.chain(batches, held)
    key = _kept.key_of(model, loss, measured, settings, declared, options=options, sources=sources(file, model))
    kept = None if force else _kept.load(path, key)
    if kept is not None:
        _errors.print(f"Kept from an earlier run: {path} (repeat with --force)", soft_wrap=True)
        return kept, []
    analysis = run_analysis(model, loss, batches, settings, declared, **options | ({"holdout": held} if held else {}))
    try:
        _kept.save(analysis, path, key)
    except FileError as error:
        _warn(f"Not kept for another run: {error}")
        path.unlink(missing_ok=True)
        return analysis, []
    return analysis, [path]


def _line(ending: "Ending", verdict: Callable[[Any], str]) -> str:
    """The outcome of an experiment on a line, after the traceback if there is one."""
    if ending.result is None:
        return f"{ending.trace}{ending.name}: {typer.style(ending.error, fg='red')}"
    cached = ", kept from an earlier run" if ending.cached else ""
    return f"{typer.style(ending.name, bold=True)} {ending.result.title}: {verdict(ending.result)}{cached}"


def _warn(text: str) -> None:
    """Print what a user should know beside the output."""
    _errors.print(text, markup=False, highlight=False, soft_wrap=True)


def _fail(error: NoetherflowError) -> None:
    """Print an error that a user can correct, and exit with code 2."""
    _errors.print(f"[red]{type(error).__name__}[/red]: ", end="")
    _warn(str(error))
    raise typer.Exit(2)
