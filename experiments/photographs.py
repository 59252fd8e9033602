"""The experiments on the embedded photographs: fine detail, solvers away from home; those also of any two models."""

from __future__ import annotations

import dataclasses

from claims import below, outside
from experiment import Claim, Experiment, Setting, evaluate, side_by_side, teacher, train
from jobs import ROOT, Job


def photographs(digits: Setting, main: dict[str, Job]) -> list[Experiment]:
    there = (ROOT / "gas_engine/assets/photos.safetensors").exists()
    lacks = "" if there else "the embedded network of photographs is not there"
    k = str(digits.steps[0])
    setting = dataclasses.replace(digits, model="photos", train_seeds="0-351", held_out="50000-50127", updates=100)
    larger = dataclasses.replace(
        setting, options=("--resolution", "40"), runs=digits.runs / "resolution-40",
        train_seeds="0-87", held_out="50000-50063", updates=60,
    )  # fmt: skip
    if len(digits.steps) == 1:
        setting, larger = setting.smoke(), larger.smoke()
    runs = {
        "GS of photos": train(setting, f"gs-k{k}", "--steps", k),
        "GS of photos at 40 px": train(larger, f"gs-k{k}", "--steps", k),
        "GS of digits": main[f"GS, K = {k}"],
    }
    measured, *elsewhere = (
        evaluate(where, name, [*runs.values()], "classical", *more, steps=k)
        for where, name, more in (
            (setting, "evaluation-photos", ("--selection", "8")), (digits, "evaluation-transfer", ()),
            (larger, "evaluation-transfer", ("--selection", "8")),
        )
    )  # fmt: skip
    own = {"GS of photos": runs["GS of photos"]}
    drawn = side_by_side(setting, own, {"UniPC": ("unipc2-bh1", "--steps", k, "--grid", "uniform")}, "50000-50007")
    lengths = (
        f"{setting.updates} updates on 352 samples, measured on 128 seeds; at 40 pixels {larger.updates} on 88, "
        "measured on 64: short runs. Classical solvers are the best of their settings on 8 other seeds."
    )
    short = "A short run, whose loss is L1."
    return [
        Experiment(
            "photos", "Photographs: distance and fine detail",
            "Figure 4: what few-step samples lose is fine detail. Detail is power above half the Nyquist frequency "
            "over the teacher's.",
            learned=runs, evaluations=(measured,), table=("l1", "detail", "fd_teacher", "psnr"),
            figure="figures", others=(teacher(setting),),
            claims=(
                Claim("GS is nearer than every classical solver.", below("GS of photos", kind="classical")),
                Claim("It is nearer to the teacher's samples as a set (FD) as well.",
                      below("GS of photos", metric="fd_teacher", kind="classical"), short),
                Claim("And to the data (FD).", below("GS of photos", metric="fd_data", kind="classical"), short),
            ),
            note=lengths, lacks=lacks,
        ),
        Experiment(
            "photo-pictures", "Photographs side by side",
            f"The same noise, K = {k}: the 20-evaluation teacher, GS, the best classical solver; below, errors on one "
            "scale.",
            learned=own, others=drawn, collect="samples", figure="samples", table=("l1",), lacks=lacks,
        ),
        Experiment(
            "transfer", "A solver on a data set, and at a resolution, that it was not learned on",
            "Table 7: a solver learned on one data set serves another, worse than one of its own, better than none. "
            "The network of photographs makes larger ones as well, 40 pixels a side instead of 32.",
            learned=runs, evaluations=(measured, *elsewhere), table=("l1",), over="model",
            claims=(
                Claim("A solver learned at 32 pixels is nearer than every classical solver at 40.",
                      outside(("GS of photos", "photos at 40 px"))),
                Claim("A solver learned at 40 pixels is nearer than every classical solver at 32.",
                      outside(("GS of photos at 40 px", "photos")),
                      f"It had {larger.updates} updates on 88 samples, and is no better at home."),
                Claim("A solver learned on the other data set is nearer than every classical solver, on both.",
                      outside(("GS of digits", "photos"), ("GS of photos", "digits")),
                      "Told times and corrections are fitted to a network, and these two differ in size, data and "
                      "classes; the paper's pairs are more alike."),
            ),
            note=lengths, lacks=lacks,
        ),
    ]  # fmt: skip


def transfer(setting: Setting, main: dict[str, Job]) -> list[Experiment]:
    """Solvers of two models, each on both; nothing where no other model was named."""
    if not setting.other:
        return []
    k = str(setting.steps[0])
    other = dataclasses.replace(setting, model=setting.other, other="", runs=setting.runs / "transfer")
    runs = {
        f"GS of {setting.name}": main[f"GS, K = {k}"],
        f"GS of {other.name}": train(other, f"gs-k{k}", "--steps", k),
    }
    return [
        Experiment(
            "transfer", "A solver on a model that it was not learned on",
            "Table 7: a solver learned on one data set serves another, worse than one of its own, better than none.",
            learned=runs, table=("l1",), over="model",
            evaluations=tuple(
                evaluate(where, "evaluation-transfer", [*runs.values()], "classical", steps=k)
                for where in (setting, other)
            ),
        )
    ]  # fmt: skip
