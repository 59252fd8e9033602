"""The bytes of one update by phase, from a tracker that watches it and changes nothing."""

from __future__ import annotations

import csv
import io
from functools import partial

from torch import Tensor

from ..files import write_text
from ..memory import ByteTracker
from .directory import RunDirectory
from .trainer import Trainer

READINGS = 400


def update(trainer: Trainer, directory: RunDirectory) -> Tensor:
    """``trainer.update()``; the first one, or the first with an adversary, leaves ``memory.csv``.

    Compiled or captured networks are not watched: what runs under a tracker would be other code.
    """
    adversary, execution = trainer.adversary, trainer.execution
    first = 0 if adversary is None else adversary.settings.warm_up
    watched = trainer.step == first and directory.writes and not trainer.group.lockstep
    if not watched or execution.compile or execution.cuda_graphs:
        return trainer.update()
    with ByteTracker(readings=READINGS) as tracker:
        loss = trainer.update()
    directory.attempt("the course of memory", partial(write_text, directory.path / "memory.csv", as_csv(tracker)))
    return loss


def as_csv(tracker: ByteTracker) -> str:
    """A row for each reading: operations so far, and bytes alive by the phase that made them ("host" beside them)."""
    rows = tracker.timeline
    phases = sorted({name for row in rows for name in row.by_phase})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["operation", *phases])
    writer.writerows([row.operation, *(row.by_phase.get(name, 0) for name in phases)] for row in rows)
    return text.getvalue()
