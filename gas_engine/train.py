"""Learn a few-step solver: ``python -m gas_engine.train --checkpoint-every 1`` trains on the embedded digits.

Writes a run directory: config, metrics, TensorBoard events, sample grids, plots of the learned times and tableau,
checkpoints, the solver itself, and at the end a table against every classical solver at the same K.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Collection, Sequence

from ._cli import InputError, command, console
from .distributed import Group
from .files import write_text
from .models import open_model
from .pictures import can_draw
from .plan import as_csv
from .training import setup
from .training.data import own_prompts, teacher_set
from .training.loop import resume, train
from .training.opening import opened
from .training.options import Config, plain
from .training.presets import name_of, with_preset
from .training.results import finish
from .training.students import new_solver
from .training.trainer import Trainer


def run(config: Config, given: Collection[str] = ()) -> None:
    """Train, or go on training, and compare. ``given``: options that were given, be it with their default."""
    with Group.from_environment() as group:
        _run(config, given, group)


def _run(config: Config, given: Collection[str], group: Group) -> None:
    directory, config = group.first(lambda: opened(config, given))
    directory.writes = group.main
    setup.check_shard(config, group)
    group = dataclasses.replace(group, lockstep=config.shard)
    device = group.device(config.device)
    model, recipe = open_model(config, own_prompts(config)), setup.recipe(config)
    if config.guidance is None and model.conditioning is not None and model.conditioning.null is not None:
        console.print(
            "guidance  none was given, so the solver learns samples without it; --guidance 7.5 is a scale, 2:9 a range",
            soft_wrap=True,
        )
    can_draw(model)
    solver = new_solver(config, model, recipe)
    execution, others = setup.execution(config), setup.compared(config, model)
    loss = setup.loss(config, model, device)
    adversary = setup.adversary(config, model, recipe, device)
    denoiser = execution.place(model, "cpu" if config.shard else device)
    plans = setup.plans(config, model, denoiser, recipe, solver, device, group, adversary, loss)
    if plans is not None:
        execution = plans.choice.execution
        config = dataclasses.replace(config, sample_batch=min(config.sample_batch, setup.sample_batch(plans, model)))
    if config.shard:
        denoiser, execution = setup.sharded(denoiser, execution, device)
        del model
    seeds, targets, stored = teacher_set(config, denoiser, device, group)
    start = solver.tableau(denoiser.prediction)
    trainer = Trainer(
        denoiser, solver, seeds, targets, loss, recipe, execution, config.seed, device, adversary, group, stored
    )  # fmt: skip
    if execution.lean and any(done for done, _ in trainer.coverage.values()):  # EDM networks are lean as they are
        console.print(f"lean      {trainer.coverage.told}", soft_wrap=True)
    if plans is not None:
        trainer.cheaper = (plan.execution for plan in plans.choice.cheaper_ones())
    trainer.best.patience = config.patience
    if config.resume:
        resume(trainer, directory, config, group.first(lambda: directory.restore(strict=config.resume != "auto")))
        console.print(f"resuming {directory.path} at update {trainer.step}", soft_wrap=True)
    else:
        directory.create(plain(config))
    if plans is not None and directory.writes:
        write_text(directory.path / "plan.csv", as_csv(plans))
    selection = setup.samples(denoiser, setup.SELECTION_SEEDS[: config.selection], config, device, group)
    train(trainer, directory, config, selection)
    try:
        finish(trainer, directory, config, selection, start, others)
    except OSError as error:
        raise InputError(
            f"the results could not be written to {directory.path} ({error.strerror or error}); all updates are done "
            f"and kept: make room and finish with --out {directory.path} --resume"
        ) from None


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``gas-engine train``."""
    try:
        words = _resuming(with_preset(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        print(f"gas-engine train: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    command("train", Config, functools.partial(run, given=_given(words)), words)


def _given(words: Sequence[str]) -> set[str]:
    """Names of the options among the words; ``--no-lean`` gives lean."""
    flags = {field.name for field in dataclasses.fields(Config) if isinstance(field.default, bool)}
    names = {name_of(word) for word in words if word.startswith("--")}
    return {name.removeprefix("no_") if name.removeprefix("no_") in flags else name for name in names}


def _resuming(words: Sequence[str]) -> list[str]:
    """``--resume`` alone says yes."""
    said: list[str] = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        alone = word == "--resume" and following not in ("auto", "True", "False")
        said += [word, "True"] if alone else [word]
    return said


if __name__ == "__main__":
    main()
