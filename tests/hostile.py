"""Reads hostile files in a process that watches itself: ``python tests/hostile.py FOLDER made|mutated FIRST LAST``."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import random
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile_files

from gas_engine import Schedule, load_solver
from gas_engine._safe_pickle import read_pickle
from gas_engine.adapters import load_edm
from gas_engine.adapters.converting import kind_of
from gas_engine.adapters.published import read_published_teacher_set
from gas_engine.adapters.r3gan import load_r3gan
from gas_engine.teacher import load_teacher_set

READERS: dict[str, Callable[[Path], Any]] = {
    "edm": load_edm, "r3gan": load_r3gan, "set": read_published_teacher_set, "checkpoint": read_pickle,
    "kind": kind_of, "student": lambda path: load_solver(path, Schedule.edm(), 1e-3),
    "solver": load_solver, "index": lambda path: load_teacher_set(path.parent),
}  # fmt: skip
SUFFIX = {"student": "student.pt", "solver": "solver.safetensors", "index": "index.json"}
FORBIDDEN = (
    "exec", "compile", "import", "subprocess", "os.", "shutil", "socket", "ctypes", "pickle.find_class", "code.__new__",
    "pty", "webbrowser", "urllib", "marshal", "builtins.input",
)  # fmt: skip
OPCODES = b".(0125BCGIJKLMNPQRSTUVX]abcdeghijlopqrstu})\x80\x81\x8a\x8b\x8e\x92\x93\x94\xff"


class Watch:
    """An audit hook: whatever a reader does beside reading its file."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.armed = False
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.armed and event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
            self.seen.append(f"{event} {args[:2]}")
        if self.armed and event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {str(args)[:100]}")


def outcome(kind: str, content: bytes, folder: Path, watch: Watch) -> str:
    """``value`` or the one sentence; raises AssertionError for anything else."""
    path = folder / SUFFIX.get(kind, "hostile.pkl")
    path.write_bytes(content)
    watch.armed = True
    try:
        READERS[kind](path)
        said = "value"
    except ValueError as error:
        said = str(error)
        watch.armed = False
        assert path.name in said and "\n" not in said and len(said) < 1500, said
        assert said.encode() and "more memory than there is" not in said and "allocate" not in said, said
    finally:
        watch.armed, seen, watch.seen = False, watch.seen, []
    assert not seen, seen
    return said


def made(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """Hand-made files, each for the readers that could go wrong with it."""
    families = {
        "executions": ("checkpoint", "kind", "edm", "student"),
        "bombs": ("checkpoint", "kind"),
        "containers": ("checkpoint", "student"),
        "modules": ("kind", "edm", "r3gan", "set", "student"),
        "safetensors": ("edm", "r3gan", "set", "solver"),
    }
    for family, kinds in families.items():
        for label, content in hostile_files.MAKERS[family](*[str(folder / "canary")][: family == "executions"]):
            for kind in kinds:
                yield label, kind, content


def mutated(seeds: list[tuple[str, bytes]], count: int, chance: random.Random) -> tuple[str, bytes]:
    kind, content = seeds[count % len(seeds)]
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        # Half of the time among the first kilobyte: most of a file is numbers, where nothing can go wrong.
        place = chance.randrange(max(1, min(len(changed), chance.choice((1024, 2**30)))))
        (action,) = chance.choices(range(7), (8, 8, 1, 3, 3, 3, 3))
        if action == 0 and changed:
            changed[place % len(changed)] ^= 1 << chance.randrange(8)
        elif action == 1 and changed:
            changed[place % len(changed)] = chance.choice(OPCODES)
        elif action == 2:
            del changed[chance.randrange(len(changed) + 1) if chance.random() < 0.3 else max(0, len(changed) - 30) :]
        elif action == 3:
            other = seeds[chance.randrange(len(seeds))][1]
            start = chance.randrange(len(other))
            changed[place:place] = other[start : start + chance.randrange(200)]
        elif action == 4:
            changed[place : place + 4] = chance.choice((b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80"))
        elif action == 5:
            del changed[place : place + chance.randrange(40)]
        else:
            changed[place:place] = changed[place : place + chance.randrange(100)]
    return kind, bytes(changed)


def main(folder: Path, which: str, first: int, last: int) -> None:
    faulthandler.enable()
    watch = Watch()
    seeds = hostile_files.seeds(folder)
    for kind, content in seeds:  # what is imported late is imported now
        said = outcome(kind, content, folder, watch) if kind != "index" else "value"
        assert said == "value", (kind, said)
    warm(folder)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**30, size + 2**30))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts: Counter[str] = Counter()
    results, failed = {}, []
    if which == "made":
        for label, kind, content in made(folder):
            results.setdefault(label, {})[kind] = outcome(kind, content, folder, watch)
    else:
        for count in range(first, last):
            kind, content = mutated(seeds, count, random.Random(count))
            try:
                said = outcome(kind, content, folder, watch)
            except Exception as error:
                failed.append(f"{count} {kind}: {type(error).__name__} {str(error)[:300]}")
                continue
            counts[f"{kind}: {'value' if said == 'value' else 'refused'}"] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    json.dump({"counts": counts, "results": results, "grown": grown, "failed": failed}, sys.stdout)


def warm(folder: Path) -> None:
    """What readers import late is imported now."""
    for kind, read in READERS.items():
        path = folder / SUFFIX.get(kind, "hostile.pkl")
        for content in (b"\x80\x04N.", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", b"PK\x03\x04"):
            path.write_bytes(content)
            with contextlib.suppress(ValueError):
                read(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
