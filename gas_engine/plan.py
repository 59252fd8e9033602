"""Plan memory: ``gas-engine plan --model sd15 --batch 24 --steps 10 --memory-budget 8GiB``; no weights needed.

Prints ways to run one training iteration, fastest first, and writes all of them as ``plan.csv`` and ``plan.png``.
"""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from ._cli import InputError, command, console, progress, writable
from .architectures import ARCHITECTURES, Architecture
from .denoiser import Denoiser, seeded
from .execution import BLOCKS, DTYPES, WEIGHTS, Weights
from .files import atomic, write_text
from .guidance import guided, parse_guidance
from .memory import MemoryPolicy
from .models import ModelOptions, open_model
from .networks import discriminator_for
from .planner import Plan, Plans, plan
from .rehearsal import PHASES
from .training.adversary import Adversarial, Adversary
from .units import show_bytes

HEADS = {
    "weights": "kind", "trajectory": "states", "graphs": "kept", "micro_batch": "micro", "forward_bytes": "fwd",
    "loss_bytes": "loss", "backward_bytes": "bwd", "weight_bytes": "weights", "bytes": "peak",
}  # fmt: skip


@dataclass
class Config(ModelOptions):
    """Find the fastest way to train a solver in a number of bytes; needs no GPU and no weights."""

    model: str = "digits"
    """cifar10, ffhq64, adm64, ldm4, dit-xl2, sd15, sdxl, sd3 or flux; or a model as train and sample take it."""
    batch: int = 24
    """Samples per update."""
    steps: int = 10
    """Network evaluations K of the student."""
    memory_budget: str = "8GiB"
    """Bytes of the device for tensors, such as 8GiB; a CUDA context needs about half a GiB more."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the network's weights and arithmetic (train --precision); the usual one of the model unless given."""
    loss: str = "l1"
    """l1, l2, huber, lpips, lpips-alex, lpips-squeeze, or a sum such as lpips+0.1*l1."""
    loss_chunk: int | None = None
    """Samples at a time within the loss; 1 for LPIPS and all for others unless given."""
    adversarial: bool = False
    """Train against a discriminator of the usual size as well."""
    weights: tuple[Weights, ...] = ("resident",)
    """What may be done with the weights: resident, streamed (from the host), int8, nf4."""
    evaluation_seconds: float | None = None
    """Measured seconds of one evaluation of the whole batch without gradients, for predictions in seconds."""
    out: Path = field(default=Path("plans"))
    """Directory for plan.csv and plan.png."""


def run(config: Config) -> Plans:
    """Measure, print, write; raises ValueError if no plan fits, after that."""
    bundled = ARCHITECTURES.get(config.model)
    denoiser, cond = _bundled(bundled, config) if bundled else _opened(config)
    dtype = DTYPES.get(config.dtype, bundled.dtype if bundled else None)
    with progress() as bar:
        task = bar.add_task("plan", total=2 + len(BLOCKS), note="")

        def tell(what: str) -> None:
            bar.update(task, advance=1, note=what)

        adversary, beside = None, None
        if config.adversarial:
            shape = denoiser.shape or ()
            adversary = Adversary(discriminator_for(shape), Adversarial(micro_batch=config.batch))
            beside = functools.partial(adversary.fitted, shape, config.batch, config.steps)
        plans = plan(
            denoiser, config.steps, config.batch, config.memory_budget, cond=cond, loss=config.loss,
            loss_chunk=config.loss_chunk, dtype=dtype, weights=config.weights,
            evaluation_seconds=config.evaluation_seconds, beside=beside, on_probe=tell,
        )  # fmt: skip
        bar.update(task, completed=2 + len(BLOCKS), note="")
    title = f"{bundled.title if bundled else denoiser.name}, batch {config.batch}, K = {config.steps}"
    said = [word for word in ("guidance", "adversarial") if getattr(config, word) and getattr(config, word) != "1"]
    title = ", ".join([title, *said, show_bytes(plans.budget)])
    console.print(table(plans, title), width=max(console.width, 110), crop=False, soft_wrap=False)
    directory = writable(config.out)
    write_text(directory / "plan.csv", as_csv(plans))
    plot(directory / "plan.png", plans, title)
    console.print(f"all {len(plans)} plans: {directory}/plan.csv  plan.png", soft_wrap=True)
    chosen = plans.choice
    console.print(
        f"choice: micro-batch {chosen.micro_batch}, {_short(chosen.memory)}, blocks={chosen.blocks!r}, "
        f"{chosen.weights} weights"
        + (f", {adversary.settings.micro_batch} pairs at a time" if adversary else "")
        + f": {show_bytes(chosen.bytes)}",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    return plans


def row(chosen: Plan, plans: Plans) -> dict[str, Any]:
    """A plan in words and numbers; bytes as integers."""
    calls = plans.iteration.steps * (2 if chosen.memory.split_guidance else 1)
    return {
        "weights": chosen.weights, "blocks": chosen.blocks,
        "guidance": ("split" if chosen.memory.split_guidance else "joint") if plans.iteration.together > 1 else "",
        "trajectory": chosen.memory.trajectory, "graphs": chosen.memory.kept(calls),
        "micro_batch": chosen.micro_batch, "calls": chosen.calls,
        **{f"{name}_bytes": chosen.peaks[name] for name in PHASES},
        "before_bytes": chosen.before, "weight_bytes": chosen.weight_bytes, "input_bytes": chosen.input_bytes,
        "bytes": chosen.bytes,
        "time": round(chosen.passes, 2), "seconds": chosen.seconds, "feasible": chosen.feasible,
    }  # fmt: skip


def table(plans: Plans, title: str) -> Table:
    """The best plan of each kind; times in plain evaluations of the whole batch."""
    caption = "GiB; time in plain evaluations of the batch; → choice, ✗ too large"
    shown, best = Table(title=title, caption=caption, box=None, pad_edge=False), _first(plans)
    rows = [(p, row(p, plans)) for p in plans.groups()]
    skipped = {"seconds"} if plans.iteration.evaluation_seconds is None else set()
    skipped |= {name for name in ("guidance", "weights") if len({r[name] for _, r in rows}) == 1}
    skipped |= {"input_bytes", "before_bytes", "feasible"}
    for name in rows[0][1]:
        if name not in skipped:
            shown.add_column(HEADS.get(name, name), justify="right", no_wrap=True)
    for candidate, values in rows:
        mark = "→ " if candidate is best else "" if candidate.feasible else "✗ "
        first, *cells = [_cell(name, value) for name, value in values.items() if name not in skipped]
        shown.add_row(mark + first, *cells, style="bold" if candidate is best else "" if candidate.feasible else "dim")
    return shown


def _short(memory: MemoryPolicy) -> str:
    """What the policy does not leave at its default."""
    default = MemoryPolicy()
    names = ("checkpoint_every", "trajectory", "split_guidance", "loss_alone")
    given = (f"{n}={getattr(memory, n)!r}" for n in names if getattr(memory, n) != getattr(default, n))
    return f"MemoryPolicy({', '.join(given)})"


def _first(plans: Plans) -> Plan | None:
    return next((p for p in plans if p.feasible), None)


def _cell(name: str, value: Any) -> str:
    if name.endswith("bytes"):
        return f"{value / 2**30:.2f}" if value < 9.995 * 2**30 else f"{value / 2**30:.1f}"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def as_csv(plans: Plans) -> str:
    """Every plan, fastest first."""
    rows = [row(p, plans) for p in plans]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def plot(path: Path, plans: Plans, title: str) -> None:
    """Peak bytes against predicted time, a marker for each blocks, a colour for each weights; the choice is circled."""
    from .pictures import plt  # here: it takes a second

    figure, axis = plt.subplots(figsize=(7.5, 4.8), constrained_layout=True)
    colours = dict(zip(WEIGHTS, ("C0", "C1", "C2", "C4"), strict=True))
    markers = dict(zip(BLOCKS, "osvD", strict=True))
    for weights in plans.iteration.weights:
        for blocks in BLOCKS:
            for fits in (True, False):
                some = [p for p in plans if (p.weights, p.blocks, p.feasible) == (weights, blocks, fits)]
                label = f"{weights}, blocks {blocks}{'' if fits else ', too large'}"
                axis.plot(
                    [p.passes for p in some], [p.bytes / 2**30 for p in some], markers[blocks], color=colours[weights],
                    mfc=colours[weights] if fits else "none", ms=6, alpha=0.8, label=label if some else None,
                )  # fmt: skip
    axis.axhline(plans.budget / 2**30, color="k", ls="--", lw=1)
    axis.annotate(
        f"budget {show_bytes(plans.budget)}", (0, plans.budget / 2**30), xycoords=("axes fraction", "data"),
        ha="left", va="bottom", fontsize=8, xytext=(4, 2), textcoords="offset points",
    )  # fmt: skip
    chosen = _first(plans)
    if chosen is not None:
        axis.plot(chosen.passes, chosen.bytes / 2**30, "o", ms=14, mfc="none", mec="C3", mew=2, label="choice")
    sizes = [plans.budget, *(p.bytes for p in plans)]
    wide = max(sizes) > 8 * min(sizes)
    axis.set(
        xlabel="time of an update, in plain evaluations of the batch", ylabel="peak, GiB", title=title,
        yscale="log" if wide else "linear", ylim=None if wide else (0, 1.08 * max(sizes) / 2**30),
    )  # fmt: skip
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def _bundled(model: Architecture, config: Config) -> tuple[Denoiser, Any]:
    """A network without its weights, guided if asked for, and a condition of the right shapes."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        denoiser = model.denoiser()
    cond, scale = model.cond(1), parse_guidance(config.guidance or "1")
    if scale != 1.0 and not model.guided:
        raise InputError(f"{denoiser.name} is not used with classifier-free guidance; leave out --guidance")
    return guided(denoiser, 2.0 if scale != 1.0 else 1.0, model.null_cond(1)), cond


def _opened(config: Config) -> tuple[Denoiser, Any]:
    """A model as ``train`` opens it; which text a text model is told makes no difference."""
    try:
        denoiser = open_model(config, default_prompts="a photo")
    except ValueError as error:
        known = f"; bundled without weights: {', '.join(ARCHITECTURES)}" if "unknown model" in str(error) else ""
        raise InputError(f"{error}{known}") from None
    return denoiser, seeded(denoiser, [0])[1] if denoiser.conditioning is not None else None


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``gas-engine plan``."""
    command("plan", Config, run, argv)


if __name__ == "__main__":
    main()
