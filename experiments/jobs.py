"""Commands of gas-engine that are run once: a job is done when a command with the same words has ended well."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESUMES = ("train", "teacher", "evaluate")  # go on by themselves where an earlier call with the same words was stopped
# Commands are forks of a process that has imported what they need: to import PyTorch takes each of them seconds.
VERBS = ("evaluate", "plan", "sample", "teacher", "train")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([*(f"gas_engine.{verb}" for verb in VERBS), "torch._dynamo"])


@dataclasses.dataclass(frozen=True)
class Job:
    """``gas-engine verb *words --out out``, after the jobs that it needs."""

    verb: str
    words: tuple[str, ...]
    out: Path
    needs: tuple[Job, ...] = ()

    @property
    def command(self) -> str:
        """As it is called from the root of the repository."""
        return shlex.join(["gas-engine", self.verb, *self.words, "--out", str(self.out)])

    @property
    def stamp(self) -> Path:
        """Where is written what was run and how long it took; beside the directory, which belongs to the command."""
        return ROOT / self.out.parent / f"{self.out.name}.json"

    def facts(self) -> dict[str, Any]:
        """What the stamp says; empty if this command was not begun, or another one was."""
        try:
            found = json.loads(self.stamp.read_text())
        except (OSError, ValueError):
            return {}
        return found if found["command"] == self.command else {}

    @property
    def done(self) -> bool:
        return bool(self.facts().get("finished"))


class Failed(RuntimeError):
    """A command that did not end well; says which and what it said last."""


def in_order(jobs: Iterable[Job]) -> list[Job]:
    """Every job once, after those that it needs."""
    found: dict[Path, Job] = {}

    def visit(job: Job) -> None:
        for need in job.needs:
            visit(need)
        if found.setdefault(job.out, job) != job:
            raise ValueError(f"two commands write to {job.out}: {found[job.out].command!r} and {job.command!r}")

    for job in jobs:
        visit(job)
    return [*found.values()]


def run(job: Job, threads: int = 1) -> float:
    """Run one job unless it is done; seconds that it took. Raises Failed."""
    known = job.facts()
    if known.get("finished"):
        return 0.0
    if not known or job.verb not in RESUMES:
        shutil.rmtree(ROOT / job.out, ignore_errors=True)
    words = [*job.words, "--out", str(job.out), *(["--resume", "auto"] if job.verb == "train" else [])]
    _write(job.stamp, {"command": job.command, **known})  # begun
    began = time.monotonic()
    told, tells = FORKS.Pipe(duplex=False)
    # What is read by imports, in the process that is forked.
    os.environ |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "COLUMNS": "100"}
    if str(ROOT) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = FORKS.Process(target=_call, args=(job.verb, words, job.stamp.with_suffix(".log"), tells), daemon=True)
    process.start()
    tells.close()
    process.join()
    seconds = time.monotonic() - began
    try:
        took = {"seconds": seconds, "cpu_seconds": told.recv()}
    except EOFError:  # killed
        took = {"seconds": seconds}
    took = {name: round(known.get(name, 0) + value, 1) for name, value in took.items()}
    known = {"command": job.command, **took, "threads": threads, **machine()}
    if process.exitcode == 0:
        known["finished"] = now()
    _write(job.stamp, known)
    if process.exitcode:
        last = job.stamp.with_suffix(".log").read_text(errors="replace").strip().splitlines()[-1:]
        raise Failed(f"{job.command}: exit code {process.exitcode}{': ' if last else ''}{''.join(last)}")
    return seconds


def _call(verb: str, words: list[str], log: Path, tells: Connection) -> None:
    """What ``gas-engine verb *words`` does, from the root of the repository; output goes to the end of ``log``."""
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.chdir(ROOT)
    try:
        importlib.import_module(f"gas_engine.{verb}").main(words)
    finally:
        tells.send(time.process_time())


def run_all(
    jobs: Iterable[Job], processes: int, threads: int, said: Callable[[Job, float | Failed], None]
) -> list[Failed]:
    """Run jobs that are not done, some at a time, in order as far as what they need is done; failures return.

    ``said`` hears of each. A job of which a need failed is left out. Where this is stopped, what runs is stopped.
    """
    running: dict[concurrent.futures.Future[float], Job] = {}
    waiting, failures = [job for job in in_order(jobs) if not job.done], []
    lost: set[Path] = set()
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        try:
            while waiting or running:
                busy = {job.out for job in running.values()} | {job.out for job in waiting}
                for job in [*waiting]:
                    if any(need.out in lost for need in job.needs):
                        waiting.remove(job)
                        lost.add(job.out)
                        said(job, Failed("left out: what it needs failed"))
                    elif len(running) < processes and not any(need.out in busy for need in job.needs):
                        waiting.remove(job)
                        running[pool.submit(run, job, threads)] = job
                for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done:
                    job = running.pop(future)
                    try:
                        said(job, future.result())
                    except Failed as failure:
                        lost.add(job.out)
                        failures.append(failure)
                        said(job, failure)
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return failures


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def machine() -> dict[str, str]:
    """Processor and versions, for a row of results."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    versions = {name: importlib.metadata.version(name) for name in ("gas_engine", "torch")}
    return {"device": found[1].strip() if found else platform.processor() or platform.machine(), **versions}


def _write(path: Path, facts: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(facts, indent=1) + "\n")
    temporary.replace(path)
