"""Benches: `pytest bench/` prints ratios; `--save-csv` (or OUT=DIR) keeps them; `--smoke` only runs the code.

A figure is a ratio between callables that took turns in one process: both saw the same machine in the same
minute. Files: results/<topic>_<device>_<date>.csv, columns device, driver, torch, gas_engine, threads, date,
then the bench's own.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import datetime
import importlib.metadata
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Row = dict[str, Any]
BUDGET = 5.0  # seconds after which a comparison on a slow or busy machine stops, having had five rounds
RECORDS = pytest.StashKey[dict[str, list[Row]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gas_engine")
    group.addoption("--smoke", action="store_true", help="tiny sizes and one round: only that the benches run")
    group.addoption("--save-csv", action="store_true", help="write bench/results/<topic>_<device>_<date>.csv")


def pytest_configure(config: pytest.Config) -> None:
    # The C library gives large blocks back to the system with every free, and the page faults of the next call
    # would be most of what is timed. Keep them, for all contenders alike, as CUDA's allocator does.
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_threshold, 32 << 20)  # the most it takes
    config.stash[RECORDS] = {}


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--smoke"))


def _cpu_name() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        return driver.decode() if isinstance(driver, bytes) else driver
    except Exception:  # no package or no driver: the column stays empty
        return ""


def _facts(device: str) -> Row:
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "driver": _driver() if cuda else "",
        "torch": torch.__version__,
        "gas_engine": importlib.metadata.version("gas_engine"),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
    }


@pytest.fixture(scope="session")
def device_info() -> dict[str, Row]:
    """What every row starts with, for "cpu" and, where there is a device, "cuda"."""
    return {d: _facts(d) for d in ("cpu", *(("cuda",) if torch.cuda.is_available() else ()))}


@pytest.fixture
def bench_record(request: pytest.FixtureRequest, device_info: dict[str, Row]) -> Callable[..., None]:
    """bench_record(topic, on="cpu", **row): one row of results/<topic>_<device>_<date>.csv."""

    def record(topic: str, on: str = "cpu", **row: Any) -> None:
        request.config.stash[RECORDS].setdefault(topic, []).append({**device_info[on], **row})

    return record


def timed(function: Callable[[], Any], on: str) -> float:
    """Seconds of one call; on a device by its own events, so that the host shows only where it limits."""
    if on != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@pytest.fixture
def compare(bench_record: Callable[..., None], benchmark: Any, smoke: bool) -> Callable[..., dict[str, float]]:
    """compare(topic, {name: callable}, rounds, on, **row): the callables take turns; ratios to the first.

    Returns the p20 of each in seconds, which a busy moment disturbs less than the median.
    """

    def run(topic: str, callables: dict[str, Callable[[], Any]], rounds: int = 15, on: str = "cpu", **row: Any) -> Any:
        rounds = 1 if smoke else rounds
        for function in callables.values():
            function()
        seconds: dict[str, list[float]] = {name: [] for name in callables}
        start = time.perf_counter()
        for done in range(rounds):
            for name, function in callables.items():
                seconds[name].append(timed(function, on))
            if done >= 4 and time.perf_counter() - start > BUDGET:
                break
        first, function = next(iter(callables.items()))
        benchmark.pedantic(function, rounds=len(seconds[first]), warmup_rounds=0)
        for name, times in seconds.items():
            p20, p50, p80 = statistics.quantiles(times, n=10)[1::3] if rounds > 1 else times * 3
            ratio = statistics.median(t / base for t, base in zip(times, seconds[first], strict=True))
            figures = {"p20_ms": p20 * 1e3, "p50_ms": p50 * 1e3, "p80_ms": p80 * 1e3, "ratio": ratio}
            bench_record(topic, on, **row, name=name, **{k: float(f"{v:.4g}") for k, v in figures.items()})
        return {name: sorted(times)[len(times) // 5] for name, times in seconds.items()}

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The rows as tables, without the columns that are the same for all."""
    for topic, rows in config.stash[RECORDS].items():
        columns = [c for c in dict.fromkeys(k for row in rows for k in row) if c not in _COMMON]
        table = [columns, *([str(row.get(c, "")) for c in columns] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        terminalreporter.section(f"{topic}: {', '.join(dict.fromkeys(str(r['device']) for r in rows))}")
        for line in table:
            terminalreporter.write_line("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)))


_COMMON = ("device", "driver", "torch", "gas_engine", "threads", "date")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


@pytest.fixture(scope="session", autouse=True)
def _save(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Write the rows when the session ends, one file per topic and device."""
    yield
    config = request.config
    if config.getoption("--smoke"):
        folder = tmp_path_factory.mktemp("results")
    elif os.environ.get("OUT"):
        folder = Path(os.environ["OUT"])
    elif config.getoption("--save-csv"):
        folder = Path(__file__).parent / "results"
    else:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for topic, rows in config.stash[RECORDS].items():
        for device in dict.fromkeys(row["device"] for row in rows):
            mine = [row for row in rows if row["device"] == device]
            columns = list(dict.fromkeys(k for row in mine for k in row))
            with (folder / f"{topic}_{_slug(device)}_{mine[0]['date']}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, columns, restval="")
                writer.writeheader()
                writer.writerows(mine)
