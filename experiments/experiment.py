"""`Experiment`: a question, the commands that answer it, and how its rows become a table, a figure and a verdict."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

from jobs import Job

from gas_engine.adapters import EMBEDDED
from gas_engine.training.presets import name_of

Row = dict[str, str]  # a line of a CSV file
SELECTION = ("--selection", "16", "--held-out", "16", "--evaluation", "student")
QUIET = ("--logger", "none", "--evaluate-every", "0", "--no-pictures")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all experiments of a call share: the model, options passed through, where runs lie, how long they are."""

    model: str = "digits"
    options: tuple[str, ...] = ()
    other: str = ""  # a second model, for solvers away from home
    runs: Path = Path("experiments/runs")
    updates: int = 250
    long: int = 800  # the quick recipe as it stands
    train_seeds: str = "0-1399"
    held_out: str = "50000-50511"
    other_seeds: str = "70000-70511"
    steps: tuple[int, ...] = (4, 6, 8, 10)

    @property
    def name(self) -> str:
        """Of the model's directory."""
        return Path(self.model).stem.replace(":", "-")

    @property
    def place(self) -> Path:
        return self.runs / self.name

    def of_model(self, verb: str) -> tuple[str, ...]:
        """``--model``, and the options that this verb has; ``--teacher.steps`` is ``--steps`` of the verb teacher."""
        words = ["--model", self.model]
        for option, *values in self.passed():
            own = option.replace("--teacher.", "--") if verb == "teacher" else option
            words += [own, *values] if name_of(own).partition(".")[0] in options_of(verb) else []
        return tuple(words)

    def passed(self) -> list[list[str]]:
        """The options passed through, each with its values. Raises ValueError for what no verb has."""
        found: list[list[str]] = []
        for word in self.options:
            if word.startswith("--"):
                found.append([])
            elif not found:
                raise ValueError(f"{word!r} is no option; those of run.py come first, others begin with --")
            found[-1].append(word)
        known = {name for verb in ("teacher", "train", "evaluate", "sample") for name in options_of(verb)}
        unknown = [option for option, *_ in found if name_of(option).partition(".")[0] not in known]
        if unknown:
            raise ValueError(f"no command has an option {unknown[0]}; see gas-engine train --help")
        return found

    def smoke(self) -> Setting:
        """Two updates and few seeds: only that everything runs."""
        return dataclasses.replace(
            self,
            updates=2,
            long=2,
            train_seeds="0-7",
            held_out="50000-50007",
            other_seeds="70000-70007",
            steps=self.steps[:1],
        )


@functools.cache
def options_of(verb: str) -> frozenset[str]:
    config = importlib.import_module(f"gas_engine.{verb}").Config
    flags = {f"no_{field.name}" for field in dataclasses.fields(config) if isinstance(field.default, bool)}
    return frozenset({field.name for field in dataclasses.fields(config)} | flags)


@dataclasses.dataclass(frozen=True)
class Claim:
    """What is to be seen in the rows, as a test of them: whether it holds, and the figures that say so.

    ``check`` returns None where rows are missing. ``why`` is said where it does not hold.
    """

    text: str
    check: Callable[[Sequence[Row]], tuple[bool, str] | None]
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """``learned``: label -> training. ``evaluations``: commands of ``evaluate`` whose rows these are.

    ``source``: the experiment whose rows this one reads, where it has none of its own, ``labels`` those it reads.
    ``table``: figures, of which the first is also drawn. With ``over`` a column such as steps, the table has a column
    for each of its values, and shows the first figure alone. ``collect``: what makes rows that ``evaluate`` does not.
    ``lacks``: what it cannot run without, where that is not there.
    """

    name: str
    title: str
    question: str
    learned: dict[str, Job] = dataclasses.field(default_factory=dict)
    evaluations: tuple[Job, ...] = ()
    others: tuple[Job, ...] = ()
    source: str = ""
    labels: tuple[str, ...] = ()
    table: tuple[str, ...] = ("l1",)
    over: str = ""
    collect: str = "evaluated"
    figure: str = "figures"
    claims: tuple[Claim, ...] = ()
    note: str = ""
    lacks: str = ""

    @property
    def jobs(self) -> tuple[Job, ...]:
        return (*self.learned.values(), *self.evaluations, *self.others)


def teacher(setting: Setting) -> Job:
    words = (*setting.of_model("teacher"), "--seeds", setting.train_seeds)
    return Job("teacher", words, setting.place / "teacher")


def train(setting: Setting, name: str, *words: str, updates: int | None = None, needs: tuple[Job, ...] = ()) -> Job:
    """A run of the quick recipe with this many updates, without a comparison of its own: evaluate makes that."""
    made = teacher(setting)
    given = {name_of(option) for option, *_ in setting.passed()}
    recipe = () if {"recipe", "config"} & given else ("--recipe", "quick")
    memory = ("--checkpoint-every", "0") if setting.model in EMBEDDED and "memory_budget" not in given else ()
    seeds = () if "--train-seeds" in words else ("--train-seeds", setting.train_seeds)
    return Job(
        "train",
        (
            *setting.of_model("train"), *recipe, *words, "--iterations", str(updates or setting.updates), *seeds,
            "--teacher-set", str(made.out), *memory, *SELECTION, *QUIET,
        ),
        setting.place / name, (made, *needs),
    )  # fmt: skip


def evaluate(setting: Setting, name: str, runs: Sequence[Job], *more: str, steps: str = "", seeds: str = "") -> Job:
    """One evaluation of runs, and of what ``more`` names: classical solvers."""
    words = (*setting.of_model("evaluate"), "--solver", *(str(run.out) for run in runs), *more)
    words += ("--steps", steps) if steps else ()
    words += ("--selection", "32") if "classical" in more and "--selection" not in more else ()
    return Job("evaluate", (*words, "--seeds", seeds or setting.held_out), setting.place / name, tuple(runs))


def sample(setting: Setting, name: str, solver: str | Job, *words: str, seeds: str) -> Job:
    """Samples as numbers."""
    of = str(solver.out / "solver.safetensors") if isinstance(solver, Job) else solver
    needs = (solver,) if isinstance(solver, Job) else ()
    words = (*setting.of_model("sample"), "--solver", of, *words, "--seeds", seeds, "--format", "npy")
    return Job("sample", words, setting.place / name, needs)


def side_by_side(
    setting: Setting, runs: dict[str, Job], classical: dict[str, tuple[str, ...]], seeds: str = "50000-50011"
) -> tuple[Job, ...]:
    """Samples of the teacher, of runs and of classical solvers, from the same noise."""
    solvers: dict[str, tuple[str | Job, ...]] = {**{label: (run,) for label, run in runs.items()}, **classical}
    drawn = (sample(setting, f"samples-{slug(label)}", *words, seeds=seeds) for label, words in solvers.items())
    words = (*setting.of_model("teacher"), "--seeds", seeds)
    return Job("teacher", words, setting.place / "samples-teacher"), *drawn


def slug(label: str) -> str:
    return label.lower().replace("'", "").replace(", ", "-").replace(" ", "-")


def plan(setting: Setting, name: str, *words: str) -> Job:
    return Job("plan", words, setting.runs / "plans" / name)
