"""One HTML page without a network: our own markup, style and script around the data of the runs."""

from __future__ import annotations

import html
import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..files import write_text

SCRIPTS = ("elements.js", "charts.js", "learned.js", "samples.js", "tables.js", "report.js")


def write_page(path: Path, runs: list[dict[str, Any]]) -> None:
    """Write the page for runs read by ``read_run``, atomically."""
    write_text(path, page(runs))


def page(runs: list[dict[str, Any]]) -> str:
    """The page's text. Data stands in one block of JSON, which no word of a file can leave; scripts set text only."""
    from .. import __version__

    source = files(__package__) / "page"
    parts = {
        "title": html.escape(", ".join(run["name"] for run in runs)),
        "style": (source / "report.css").read_text(),
        "script": "\n".join((source / name).read_text() for name in SCRIPTS),
        "data": as_json({"version": __version__, "runs": runs}),
    }
    before, *rest = (source / "report.html").read_text().split("{{")
    return before + "".join(parts[name] + after for name, _, after in (part.partition("}}") for part in rest))


def as_json(data: Any) -> str:
    """JSON that may stand in a script element: nothing in it looks like markup, and null is what is not finite."""
    text = json.dumps(_finite(data), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(name): _finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
