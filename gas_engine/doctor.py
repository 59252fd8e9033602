"""`python -m gas_engine.doctor`: what is built, what is found, what is missing, and one line of verdict."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import tyro

__all__ = ["examine", "main"]

OPTIONAL = ("lpips", "torchvision", "diffusers", "transformers", "torchao", "tensorboard")
VARIABLES = ("GAS_ENGINE_NATIVE", "GAS_ENGINE_CUDA", "GAS_ENGINE_CUDA_ARCHS", "GAS_ENGINE_MARCH", "GAS_ENGINE_TIMEOUT")

# One row: (subject, what was found, state), state one of "ok", "note", "bad".
Row = tuple[str, str, str]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _core() -> list[Row]:
    """The native core, as the ops see it."""
    if os.environ.get("GAS_ENGINE_NATIVE", "").lower() == "off":
        return [("native core", "switched off by GAS_ENGINE_NATIVE=off: the PyTorch twins run", "note")]
    try:
        info = importlib.import_module("gas_engine._native").build_info()
    except ImportError as error:
        return [("native core", f"missing ({error}): the slower PyTorch twins run", "bad")]
    import torch

    cuda = f"CUDA {info['cuda_version']}, compute capabilities {info['cuda_archs']}" if info["cuda"] else "CPU only"
    rows = [
        ("native core", f"{info['version']}, {info['compiler']}, -march={info['march']}", "ok"),
        ("  kernels", cuda, "ok" if info["cuda"] or not torch.cuda.is_available() else "bad"),
        ("  OpenMP", f"{info['openmp_threads']} threads", "ok"),
    ]
    if info["version"] != _version("gas_engine"):
        rows.append(("  version", f"core {info['version']} beside package {_version('gas_engine')}", "bad"))
    return rows


def _gpus() -> list[Row]:
    """Each card by name, memory and driver; without a driver, a quiet line."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, no permission: all mean that there is no card to show
        return [("GPU", "no NVIDIA driver", "note")]
    try:
        driver, rows = _text(pynvml.nvmlSystemGetDriverVersion()), []
        for i in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(i)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            used = f"{memory.used / 2**30:.1f} of {memory.total / 2**30:.1f} GiB used"
            rows.append((f"GPU {i}", f"{_text(pynvml.nvmlDeviceGetName(handle))}, {used}, driver {driver}", "ok"))
        return rows or [("GPU", f"none, driver {driver}", "note")]
    except pynvml.NVMLError as error:
        return [("GPU", f"the NVIDIA driver answers: {error}", "note")]
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _packages() -> list[Row]:
    """Optional packages; torchvision is also imported, since a build for another torch fails only then."""
    rows: list[Row] = []
    for name in OPTIONAL:
        version = _version(name)
        if version is None:
            rows.append((name, "absent", "note"))
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if name == "torchvision":
                    importlib.import_module(name)
            rows.append((name, version, "ok"))
        except Exception as error:  # a binary that does not fit raises anything from OSError to RuntimeError
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            rows.append((name, f"{version}, but does not import with this torch: {reason}", "note"))
    return rows


def examine() -> dict[str, Any]:
    """All findings: {"rows": [(subject, found, state)], "verdict": str, "healthy": bool}."""
    import torch

    assets = Path(__file__).parent / "assets"
    files = sorted(f for f in assets.glob("*") if f.suffix in (".npz", ".safetensors"))
    size = sum(f.stat().st_size for f in files) / 2**20
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    usable = "a device is usable" if torch.cuda.is_available() else "no device is usable"
    rows: list[Row] = [
        ("gas_engine", _version("gas_engine") or "not installed (run from a source tree)", "ok"),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", "ok"),
        ("torch", f"{torch.__version__}, {cuda}, {usable}, {torch.get_num_threads()} threads", "ok"),
        *_core(),
        *_gpus(),
        *_packages(),
        (
            "assets",
            f"{', '.join(f.name for f in files)} ({size:.1f} MiB)" if files else "missing",
            "ok" if files else "bad",
        ),
        *((name, os.environ[name], "note") for name in VARIABLES if name in os.environ),
    ]
    bad = [row for row in rows if row[2] == "bad"]
    verdict = (
        "All is well."
        if not bad
        else "; ".join(f"{name.strip()}: {found}" for name, found, _ in bad)
        + (". Run `pip install -e .` again and read its last sentence, or set GAS_ENGINE_NATIVE=off.")
    )
    return {"rows": rows, "verdict": verdict, "healthy": not bad}


def main(argv: list[str] | None = None) -> int:
    """Print the table; exit status 1 if something that should be there is missing."""

    def arguments(as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> bool:
        """Show what is built, what is found and what is missing.

        Args:
            as_json: print JSON instead of a table.
        """
        return as_json

    as_json = tyro.cli(arguments, args=argv, prog="gas-engine doctor", config=(tyro.conf.FlagCreatePairsOff,))
    report = examine()
    if as_json:
        print(json.dumps(report, indent=2))
        return 0 if report["healthy"] else 1

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    marks = {"ok": "[green]✓[/]", "note": "[dim]·[/]", "bad": "[red]✗[/]"}
    table = Table(box=None, show_header=False, padding=(0, 1))
    for subject, found, state in report["rows"]:
        table.add_row(marks[state], subject, escape(found))
    console = Console()
    console.print(table)
    console.print(f"\n[bold {'green' if report['healthy'] else 'red'}]{escape(report['verdict'])}[/]")
    return 0 if report["healthy"] else 1


if __name__ == "__main__":
    sys.exit(main())
