"""Benches: `pytest bench/` prints ratios; `--save-csv` (or OUT=DIR) keeps them; `--smoke` only runs the code.

A figure is a ratio between callables that took turns in one process: both saw the same machine in the same
minute. Files: results/<topic>_<device>_<date>.csv, columns device, driver, torch, gas_engine, threads, date,
command, then the bench's own.
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
import shlex
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
COMMAND = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gas_engine")
    group.addoption("--smoke", action="store_true", help="tiny sizes and one round: only that the benches run")
    group.addoption("--plans", help="of bench_cards: a JSON file that plans are read from, and added to where missing")
    group.addoption("--save-csv", action="store_true", help="write bench/results/<topic>_<device>_<date>.csv")


def pytest_configure(config: pytest.Config) -> None:
    # The C library gives large blocks back to the system with every free, and the page faults of the next call
    # would be most of what is timed. Keep them, for all contenders alike, as CUDA's allocator does.
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_max, 0)
    config.stash[RECORDS] = {}
    config.stash[COMMAND] = shlex.join(["pytest", *map(str, config.invocation_params.args)])


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


def _facts(device: str, command: str) -> Row:
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "driver": _driver() if cuda else "",
        "torch": torch.__version__,
        "gas_engine": importlib.metadata.version("gas_engine"),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "command": command,
    }


@pytest.fixture(scope="session")
def device_info(request: pytest.FixtureRequest) -> dict[str, Row]:
    """What every row starts with, for "cpu" and, where there is a device, "cuda"."""
    command = request.config.stash[COMMAND]
    return {d: _facts(d, command) for d in ("cpu", *(("cuda",) if torch.cuda.is_available() else ()))}


@pytest.fixture
def bench_record(request: pytest.FixtureRequest, device_info: dict[str, Row]) -> Callable[..., None]:
    """bench_record(topic, on="cpu", **row): one row of results/<topic>_<device>_<date>.csv."""

    def record(topic: str, on: str = "cpu", **row: Any) -> None:
        request.config.stash[RECORDS].setdefault(topic, []).append({**device_info[on], **row})

    return record


def timed(function: Callable[[], Any], calls: int, on: str) -> float:
    """Seconds a call, of several in a row; a device's own count, so that the host shows only where it limits."""
    if on != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def captured(function: Callable[[], Any], calls: int) -> Callable[[], None]:
    """Several calls as a CUDA graph, in which no launch waits for the host."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph.replay


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes a second, read and written, of copying 1 GiB on the device: the yardstick of every kernel here."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    seconds = statistics.median(timed(lambda: target.copy_(source), 4, "cuda") for _ in range(9))
    return 2 * source.nbytes / seconds


@pytest.fixture
def compare(
    request: pytest.FixtureRequest, bench_record: Callable[..., None], benchmark: Any, smoke: bool
) -> Callable[..., dict[str, float]]:
    """compare(topic, {name: callable}, rounds, on, moved, **row): the callables take turns; ratios to the first.

    On a device a turn is several calls. Those that `moved` names are also captured: `device_us` and `device_ratio` are
    theirs, without the host. `moved` has the bytes that a call must move at least (0: not known), and `of_copy` is the
    bandwidth that they make, as a part of a copy's.

    Returns the p20 of each in seconds, which a busy moment disturbs less than the median.
    """

    def run(
        topic: str,
        callables: dict[str, Callable[[], Any]],
        rounds: int = 15,
        on: str = "cpu",
        moved: dict[str, int] | None = None,
        **row: Any,
    ) -> Any:
        for function in callables.values():
            function()
        first, calls = next(iter(callables)), dict.fromkeys(callables, 1)
        if on == "cuda" and not smoke:
            # Turns of about a millisecond: so many calls in a row that the device never waits for an event.
            calls = {name: max(1, min(50, int(1e-3 / timed(f, 2, on)))) for name, f in callables.items()}
            rounds = min(rounds, 7)
        seconds = _turns(callables, 1 if smoke else rounds, calls, on)
        benchmark.pedantic(callables[first], rounds=len(seconds[first]), warmup_rounds=0)
        graphs: dict[str, Callable[[], None]] = {}
        if on == "cuda" and moved:  # what waits for the host must not be tried: a failed capture cannot be undone
            graphs = {name: captured(callables[name], calls[name]) for name in moved}
        device_seconds = _turns(graphs, 1 if smoke else 7, dict.fromkeys(graphs, 1), on)
        for name, times in seconds.items():
            p20, p50, p80 = statistics.quantiles(times, n=10)[1::3] if len(times) > 1 else times * 3
            figures = {
                "p20_ms": p20 * 1e3,
                "p50_ms": p50 * 1e3,
                "p80_ms": p80 * 1e3,
                "ratio": _ratio(seconds, name, first),
            }
            if moved and name in device_seconds:
                each = {n: [t / calls[n] for t in times] for n, times in device_seconds.items()}
                figures["device_us"] = statistics.median(each[name]) * 1e6
                figures["device_ratio"] = _ratio(each, name, next(iter(moved)))
                if moved[name]:
                    bandwidth = moved[name] / figures["device_us"] * 1e6
                    figures["of_copy"] = bandwidth / request.getfixturevalue("copy_bandwidth")
            bench_record(topic, on, **row, name=name, **{k: float(f"{v:.4g}") for k, v in figures.items()})
        return {name: sorted(times)[len(times) // 5] for name, times in seconds.items()}

    return run


def _turns(
    callables: dict[str, Callable[..., Any]], rounds: int, calls: dict[str, int], on: str
) -> dict[str, list[float]]:
    """Seconds a call of every turn of each; on a slow or busy machine it ends early, after five rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in callables}
    start = time.perf_counter()
    for done in range(rounds):
        for name, function in callables.items():
            seconds[name].append(timed(function, calls[name], on))
        if done >= 4 and time.perf_counter() - start > BUDGET:
            break
    return seconds


def _ratio(seconds: dict[str, list[float]], name: str, first: str) -> float:
    return statistics.median(t / base for t, base in zip(seconds[name], seconds[first], strict=True))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The rows as tables, without the columns that are the same for all."""
    for topic, rows in config.stash[RECORDS].items():
        columns = [c for c in dict.fromkeys(k for row in rows for k in row) if c not in _COMMON]
        table = [columns, *([str(row.get(c, "")) for c in columns] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        terminalreporter.section(f"{topic}: {', '.join(dict.fromkeys(str(r['device']) for r in rows))}")
        for line in table:
            terminalreporter.write_line("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)))


_COMMON = ("device", "driver", "torch", "gas_engine", "threads", "date", "command")


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
