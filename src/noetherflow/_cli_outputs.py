"""The files that commands write: pages, JSON, pictures, weights."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from noetherflow import _files
from noetherflow._analysis import Analysis
from noetherflow._errors import MissingExtraError
from noetherflow.forecasting import Forecast
from noetherflow.report import figure, page
from noetherflow.report import forecast as forecast_page


def of_analysis(analysis: Analysis, out: Path, stem: str, complain: Callable[[str], None]) -> list[Path]:
    """Write the JSON file, the page and, with matplotlib, the figure.

    Args:
        analysis: The analysis.
        out: The folder.
        stem: The beginning of the names.
        complain: Called with a sentence if there is no figure.

    Returns:
        The files.
    """
    written = [out / f"{stem}.json", out / f"{stem}.html"]
    analysis.save_json(written[0])
    page.write(written[1], analysis)
    try:
        written += figure.save(analysis, out / stem)
    except MissingExtraError as error:
        complain(f"No picture: {error}")
    return written


def of_forecast(forecast: Forecast, out: Path, stem: str) -> list[Path]:
    """Write the page and the JSON file.

    Args:
        forecast: The forecast.
        out: The folder, which may hold the files of an analysis of equal stem.
        stem: The beginning of the names.

    Returns:
        The files.

    Raises:
        FileError: If the page cannot be written.
    """
    written = [out / f"{stem}.forecast.html", out / f"{stem}.forecast.json"]
    forecast_page.write(written[0], forecast, stem)
    forecast.save_json(written[1])
    return written


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the weights of a model as safetensors, completely or not at all; tied weights are written once."""
    from safetensors.torch import save_model

    with _files.atomic(path) as temporary:
        save_model(model, str(temporary))
