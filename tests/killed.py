"""Runs that are killed and resumed: ``python killed.py DIRECTORY KILLS SEED``, one import for all their processes.

Each run is a forked process that begins from what is on disk (``--resume auto``) and gets SIGKILL: while it sets up,
while it trains, or from within, at a random one of the calls that put files in their places.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.utils.tensorboard

from gas_engine import train
from gas_engine.training import setup

UPDATES = 60
OPTIONS = [
    "--model", "toy:make", "--steps", "2", "--recipe", "quick", "--train-seeds", "0-31", "--batch", "4",
    "--device", "cpu", "--evaluation", "student", "--iterations", str(UPDATES), "--save-every", "3",
    "--evaluate-every", "5", "--patience", "50", "--sample-every", "50", "--log-every", "4", "--resume", "auto",
    "--adversarial", "--penalty", "double_backward", "--fakes", "reuse", "--discriminator-rate", "1e-3",
]  # fmt: skip


def started(out: Path, die_at_call: int | None = None) -> int:
    """The process id of a run in ``out``."""
    pid = os.fork()
    if pid:
        return pid
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    if die_at_call is not None:
        _die_at(die_at_call)
    code = 1
    try:
        train.main([*OPTIONS, "--out", str(out), "--teacher-set", str(out.parent / "teacher")])
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def _die_at(call: int) -> None:
    """SIGKILL before the nth of all calls that sync, rename or remove."""
    left = [call]

    def deadly(function):
        def counted(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    for name in ("fsync", "rename", "replace", "rmdir", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))


def discriminator(shape: tuple[int, ...]) -> torch.nn.Module:
    """A small one, for states of the toy model."""
    layers = [torch.nn.Flatten(), torch.nn.Linear(math.prod(shape), 8), torch.nn.LeakyReLU(), torch.nn.Linear(8, 1)]
    return torch.nn.Sequential(*layers, torch.nn.Flatten(0))


def newest(out: Path) -> int:
    return max((int(p.name.removeprefix("step-")) for p in out.glob("checkpoints/step-*")), default=-1)


def killed(out: Path, target: int, draw: random.Random, kind: str) -> str:
    """Start a run and kill it: at once or so, or when its checkpoints have reached ``target``; says when it died."""
    pid = started(out, draw.randrange(1, 60) if kind == "writing" else None)
    begun = time.monotonic()
    if kind == "setting up":
        time.sleep(draw.uniform(0, 1.0))
    elif kind == "training":
        while newest(out) < target and time.monotonic() - begun < 60:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
    if kind != "writing":
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    how = "killed" if os.WIFSIGNALED(status) else f"ended with {os.waitstatus_to_exitcode(status)}"
    return f"{kind}: {how} at checkpoint {newest(out)}"


def main() -> None:
    root, kills, draw = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    torch.set_num_threads(1)
    setup.SELECTION_SEEDS, setup.HELD_OUT_SEEDS = range(40_000, 40_008), range(50_000, 50_016)
    setup.discriminator_for = discriminator
    assert os.waitpid(started(root / "whole"), 0)[1] == 0, (root / "whole.log").read_text()
    kinds = ["training", "writing", "training", "setting up"]
    report = [
        killed(root / "killed", UPDATES * i // (kills + 1), draw, kinds[i % len(kinds)]) for i in range(1, kills + 1)
    ]
    begun = time.monotonic()
    assert os.waitpid(started(root / "killed"), 0)[1] == 0, (root / "killed.log").read_text()
    print(json.dumps({"kills": report, "last_seconds": round(time.monotonic() - begun, 2)}))


if __name__ == "__main__":
    main()
