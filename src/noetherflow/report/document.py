"""A self-contained HTML page: style, scripts and data in a file that loads nothing."""

import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template

from noetherflow import _files
from noetherflow._errors import FileError


def write(path: Path, *, title: str, style: str, body: str, data: object, scripts: Sequence[str]) -> None:
    """Write a page, completely or not at all.

    Args:
        path: The HTML file.
        title: The title, as text.
        style: CSS after that of `base.css`.
        body: HTML.
        data: What scripts read from the element `data`, as JSON types; NaN and infinities become null.
        scripts: The source of scripts, after that of `table.js`, which run when the page is complete.

    Raises:
        FileError: If the file cannot be written.
    """
    shared = "noetherflow.report"
    sources = (asset(shared, "table.js"), *scripts)
    content = {
        "title": html.escape(title),
        "style": asset(shared, "base.css") + style,
        "body": body,
        "data": _embedded(data),
        "scripts": "\n".join(f"<script>\n{source}</script>" for source in sources if source),
    }
    page = Template(asset(shared, "document.html")).substitute(content)
    try:
        with _files.atomic(path) as temporary:
            # A name from a user's program may hold half of a surrogate pair, which UTF-8 cannot express.
            temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error}; check the path and its permissions") from error


def asset(package: str, name: str) -> str:
    """Text of a file that is stored beside the modules of a package."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def _embedded(content: object) -> str:
    """JSON for a script element; `<` is escaped so that no string can close the element."""
    return json.dumps(_files.finite(content), allow_nan=False).replace("<", "\\u003c")
