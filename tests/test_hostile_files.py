"""Hostile files: nothing in them runs, no process dies of them, memory stays bounded, each ends in one sentence."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited and read as on Linux: run it there")
HERE = Path(__file__).parent
MUTATED = 10_000
PROCESSES = 2


def start(folder, *args):
    """A process that reads hostile files and ends at the first thing that must not happen."""
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    command = [sys.executable, str(HERE / "hostile.py"), str(folder), *map(str, args)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process, folder):
    out, error = process.communicate(timeout=500)
    assert process.returncode == 0, f"the file is kept in {folder}: {error[-2000:]}"
    assert not (folder / "canary").exists()
    report = json.loads(out)
    assert not report["failed"], report["failed"][:5]
    assert report["grown"] < 2**28, report["grown"]
    return report


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "files"
    return ended(start(folder, "made", 0, 0), folder)["results"]


def test_files_made_by_hand(results):
    assert len(results) >= 50
    sentences = {said for kinds in results.values() for said in kinds.values() if said != "value"}
    assert len(sentences) > 50  # each tells its own


def test_code_becomes_records(results):
    """What would run is a value without effect, or is refused; an EDM network or a student it is not."""
    for label in (
        "system",
        "stack-global",
        "eval",
        "exec-python2",
        "getattr-chain",
        "torch-load",
        "state",
        "torch-jit",
    ):
        assert results[label]["checkpoint"] == "value", label
        assert results[label]["edm"] != "value" and results[label]["student"] != "value"


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("length-8e", "truncated"), ("long-large", "digits"), ("laughs-key", "parts"),
        ("range", "container of a Record"), ("bytes", "bytes of a int"), ("copies", "unfolds"), ("sets", "unfolds"),
        ("storages", "unfolds"), ("matryoshka", "nests"), ("array", "written as 8 bytes"), ("outside", "outside"),
        ("expanded", "more numbers than are written"), ("negative-stride", "no numbers"), ("compressed", "compressed"),
        ("same-name", "two records"), ("storage-size", "too short"), ("stream-size", "truncated"),
    ],
)  # fmt: skip
def test_bombs_are_refused_for_what_they_are(results, label, said):
    assert re.search(said, results[label]["checkpoint"]), results[label]["checkpoint"]


@pytest.mark.slow
def test_mutated_files(tmp_path):
    """Valid files of every format with flipped, cut, repeated and exchanged bytes; some of them are still valid."""
    share = MUTATED // PROCESSES
    folders = [tmp_path / str(part) for part in range(PROCESSES)]
    started = [start(f, "mutated", part * share, (part + 1) * share) for part, f in enumerate(folders)]
    counts = [ended(process, folder)["counts"] for process, folder in zip(started, folders, strict=True)]
    assert sum(sum(part.values()) for part in counts) == MUTATED
    for kind in ("edm", "r3gan", "set", "student", "checkpoint"):
        assert all(part[f"{kind}: value"] > 0 and part[f"{kind}: refused"] > 0 for part in counts), kind
