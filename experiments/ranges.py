"""The experiments with one solver for a range: of K, of guidance scales."""

from __future__ import annotations

import dataclasses

from claims import below, within
from experiment import Claim, Experiment, Setting, evaluate, train

from gas_engine.conditioning import SCALES

ANY = (4, 5, 6, 7, 8, 9, 10)
GUIDANCE = ("1.5", "3", "5", "7.5")


def any_steps(setting: Setting) -> Experiment:
    """One solver for every K."""
    every = ANY if len(setting.steps) > 1 else setting.steps
    updates = len(ANY) * setting.long
    runs = {"one for all K": train(setting, "any", "--steps", f"{ANY[0]}-{ANY[-1]}", updates=updates)}
    for k in every:
        runs[f"each its own, K = {k}"] = train(setting, f"gs-long-k{k}", "--steps", str(k), updates=setting.long)
    steps = ",".join(map(str, every))
    return Experiment(
        "any-steps", "One solver for every K",
        "An open question of the paper: a single parameter set for a range of K, against solvers trained for each.",
        learned=runs, evaluations=(evaluate(setting, "evaluation-any-steps", [*runs.values()], steps=steps),),
        table=("l1",), over="steps",
        claims=(Claim("At each K the one solver is within 10 % of the separately trained ones.",
                      within(0.1, "one for all K", "each its own")),),
        note=f"The one solver had {updates} updates, of one K each, the others {setting.long} each. "
        "At full degree there are as many polynomials as points (K, position, lag): 511 numbers, as many as move "
        "samples in seven separate solvers, so every K can have what it would have alone, and little is shared.",
    )  # fmt: skip


def guidance(digits: Setting) -> list[Experiment]:
    """One solver for a range of guidance scales, on the embedded model that can be guided."""
    k = str(digits.steps[0])

    def at(scale: str) -> Setting:  # each scale has teacher samples of its own
        runs = digits.runs / f"guidance-{scale.replace(':', '-')}"
        return dataclasses.replace(digits, model="digits-guided", options=("--guidance", scale), runs=runs)

    every, updates = at(f"{GUIDANCE[0]}:{GUIDANCE[-1]}"), digits.long // 2
    one = train(every, f"gs-range-k{k}", "--steps", k, updates=SCALES * updates)
    same = train(every, f"gs-same-k{k}", "--steps", k, "--same-at-every-scale", updates=updates)
    runs, measured = {"one for all scales": one, "the same at every scale": same}, []
    for scale in GUIDANCE:
        own = train(at(scale), f"gs-g{scale}-k{k}", "--steps", k, updates=updates)
        runs[f"each its own, guidance {scale}"] = own
        measured.append(evaluate(at(scale), "evaluation-guidance", [one, same, own], "classical", steps=k))
    return [
        Experiment(
            "guidance", "One solver for a range of guidance scales",
            f"Tables that are quadratic in log(1 + scale), K = {k}, against a solver that is the same at "
            "every scale, solvers trained for each, and the classical ones, each beside the teacher of that scale.",
            learned=runs, evaluations=tuple(measured), table=("l1", "fd_teacher"), over="guidance",
            claims=(
                Claim("At each scale the one solver is within 10 % of the separately trained ones.",
                      within(0.1, "one for all scales", "each its own", over="guidance")),
                Claim("It is nearer than a solver that is the same at every scale, and than every classical solver.",
                      below("one for all scales", ("the same at every scale",), over="guidance", kind="classical")),
                Claim("It is within 10 % of the separately trained ones in FD to the teacher as well.",
                      within(0.1, "one for all scales", "each its own", "fd_teacher", "guidance"),
                      "It is where its tables were learned, at the ends; between them it is as near sample by sample "
                      "(L1), and as a set a little less. The classical ones lie several times as far."),
            ),
            note=f"The one solver had {SCALES * updates} updates, of one scale each, the others {updates} each.",
        )
    ]  # fmt: skip
