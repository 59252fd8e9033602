"""Show runs on one self-contained page: ``gas-engine report runs/A runs/B --out report.html``.

What was learned, with a slider over training; samples beside the teacher's; tables, curves, memory by phase, the plan.
The page needs no network and runs of several models or solvers stand side by side on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ._cli import InputError, command, console
from .reporting import read_run, write_page
from .units import show_bytes


@dataclass
class Config:
    """Options of ``gas-engine report``."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    out: Path | None = None
    """The page; report.html in the run's directory, if it is one run."""


def run(config: Config) -> Path:
    """Read, write, and return the page's path."""
    if not config.runs:
        raise InputError("name at least one run directory: gas-engine report runs/NAME")
    if config.out is None and len(config.runs) > 1:
        raise InputError(f"a page for {len(config.runs)} runs needs a place: give --out report.html")
    path = config.out or config.runs[0] / "report.html"
    if path.is_dir():
        raise InputError(f"--out {path} is a directory; name the page in it, such as {path / 'report.html'}")
    runs = [read_run(each) for each in config.runs]
    write_page(path, runs)
    said = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    console.print(f"{said}: {path} ({show_bytes(path.stat().st_size)})", soft_wrap=True)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``gas-engine report``."""
    command("report", Config, run, argv)


if __name__ == "__main__":
    main()
