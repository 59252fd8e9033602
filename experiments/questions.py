"""The experiments: the questions of arXiv 2510.17699 and of those that use it, as data."""

from __future__ import annotations

from claims import below, moves_less
from experiment import Claim, Experiment, Setting, evaluate, plan, side_by_side, slug, train
from photographs import photographs, transfer
from ranges import any_steps, guidance

FD = ("l1", "rmse", "fd_data", "fd_teacher")
STUDENTS: dict[str, tuple[str, ...]] = {
    "GS": (), "GAS": ("--adversarial",), "S4S-Alt": ("--student", "s4s-alt"), "S4S": ("--student", "s4s"),
    "LD3": ("--student", "ld3"), "BNS": ("--student", "bns"), "DyWeight": ("--student", "dyweight"),
    "BELM": ("--student", "belm", "--trajectory", "reversible"), "GS in S4S's form": ("--form", "s4s"),
    "GS in the linear form": ("--form", "linear"),
}  # fmt: skip
BASES = ("euler", "dpmpp2m", "dpmpp3m", "ipndm4", "deis3", "unipc3")
# Gigabytes of an iteration, arXiv 2510.17699, table 15: (GS, GAS) by K.
PAPER_GB = {
    ("cifar10", 24): {4: (17, 19), 6: (23, 25), 8: (28, 30), 10: (34, 35)},
    ("ldm4", 8): {4: (37, 41), 5: (45, 49), 6: (54, 57), 7: (62, 66)},
}


def questions(setting: Setting) -> list[Experiment]:
    """All experiments of a model, the most important first."""
    main = {
        f"{label}, K = {k}": train(setting, f"{slug(label)}-k{k}", "--steps", str(k), *words)
        for label, words in STUDENTS.items() for k in setting.steps
    }  # fmt: skip
    found = [_main(setting, main), *_read_from_main(), any_steps(setting)]
    found += [*(guidance(setting) if setting.model == "digits" else []), _kinds(setting, main)]
    found += [_samples(setting, main), _schedule(main), _pictures(setting, main), _spectrum(setting, main, found[0])]
    found += [
        _memory(setting, main),
        *(transfer if setting.other or setting.model != "digits" else photographs)(setting, main),
    ]
    found += [_bases(setting, main), *_longer(setting)]
    return found


def _first(setting: Setting) -> int:
    return setting.steps[0]


def _main(setting: Setting, runs: dict) -> Experiment:
    steps = ",".join(map(str, setting.steps))
    return Experiment(
        "main", "Every student and every classical solver",
        "The paper's tables: at equal K learned solvers are far nearer to the teacher than classical ones, and GS, "
        "and more so GAS, nearer than LD3 and S4S (FID on CIFAR-10 at K = 4: UniPC 43.92, iPNDM 35.04, LD3 9.31, "
        "S4S-Alt 6.35, GS 4.41, GAS 4.05).",
        learned=runs, evaluations=(evaluate(setting, "evaluation-main", [*runs.values()], "classical", steps=steps),),
        table=("l1", "fd_teacher", "fd_data"), over="steps",
        claims=(
            Claim("GS is nearer to the teacher than every classical solver at every K.", below("GS", kind="classical")),
            Claim("GS is nearer to the data (FD) than every classical solver at every K.",
                  below("GS", kind="classical", metric="fd_data"),
                  "Where several are at the teacher, whose own FD is given above, FD to the data no longer tells them "
                  "apart, and some land below the teacher's."),
            Claim("GS is nearer to the teacher's samples as a set (FD) than every classical solver at every K.",
                  below("GS", kind="classical", metric="fd_teacher")),
            Claim("GS is nearer than in S4S's form, and in the linear form, at every K.",
                  below("GS", ("GS in S4S's form", "GS in the linear form"))),
            Claim("GS is nearer than the paper's rivals, LD3, S4S and S4S-Alt, at every K.",
                  below("GS", ("LD3", "S4S", "S4S-Alt"))),
            Claim("GAS is nearer to the teacher's samples as a set (FD) than LD3, S4S and S4S-Alt at every K.",
                  below("GAS", ("LD3", "S4S", "S4S-Alt"), "fd_teacher"),
                  "All are close to the teacher there. One seed each, and runs that are short for a discriminator."),
            Claim("LD3 is nearer than every classical solver at every K.", below("LD3", kind="classical"),
                  "In the paper it is, in FID. Here it learns its times in 250 updates of one seed, "
                  "and the classical solvers are the best of many settings; longer runs of it were not measured."),
            Claim("GS is nearer than the other students, BNS, DyWeight and BELM, at every K.",
                  below("GS", ("BNS", "DyWeight", "BELM")),
                  "These are short runs, and BNS has 74 numbers to learn at K = 10, GS 219: at the recipe's full "
                  "length GS is nearer than BNS there as well (below). DyWeight at full length was not measured."),
            Claim("The same in FD to the teacher.", below("GS", ("BNS", "DyWeight", "BELM"), "fd_teacher"),
                  "As above."),
        ),
    )  # fmt: skip


def _read_from_main() -> list[Experiment]:
    forms = ("GS", "GS in the linear form", "GS in S4S's form", "S4S")
    return [
        Experiment(
            "parameterisation", "Parameterisation, and theory or not",
            "Tables 3 and 5: without DPM-Solver++ theory beneath, in S4S's form, FID at K = 4 on CIFAR-10 is 31.44 "
            "instead of 4.39; on FFHQ without theory 15.23/10.53/5.50/4.69 instead of 10.70/4.49/2.96/2.67.",
            source="main", labels=forms, table=("l1", "fd_teacher"), over="steps",
            claims=(Claim("Corrections around theory are nearer than both forms without it at every K.",
                          below("GS", forms[1:3])),),
            note="S4S's form multiplies the state by r = sigma+/sigma twice, which training cannot change: it starts "
            "at the weights of DPM-Solver++, not at its samples, and is a weak opponent. The linear form and S4S are "
            "fairer ones.",
        ),
        Experiment(
            "adversarial", "With and without the adversarial loss",
            "Table 4: the adversarial loss lowers FID, most at K = 4 (FFHQ 10.70 to 7.86), while the distillation loss "
            "rises.",
            source="main", labels=("GS", "GAS"), table=("fd_data", "fd_teacher", "l1", "detail"), over="steps",
            claims=(
                Claim("GAS is nearer to the data (FD) than GS at every K.", below("GAS", ("GS",), "fd_data"),
                      "Both are close to the teacher's own FD, with other solvers on either side of it, and runs are "
                      "short for a discriminator: with 800 updates GAS is below GS at K = 4 "
                      "(below)."),
                Claim("The distance to the teacher is larger with it at every K.", below("GS", ("GAS",), "l1"),
                      "One seed each: by how much a seed moves these figures was not measured."),
            ),
        ),
    ]  # fmt: skip


def _longer(setting: Setting) -> list[Experiment]:
    first = _first(setting)
    own = {
        f"GS, K = {k}": train(setting, f"gs-long-k{k}", "--steps", str(k), updates=setting.long) for k in setting.steps
    }
    runs = {**own}
    words = ("--steps", str(first), "--adversarial")
    runs[f"GAS, K = {first}"] = train(setting, f"gas-long-k{first}", *words, updates=setting.long)
    last = setting.steps[-1]  # where BNS was the most ahead after fewer updates
    words = ("--steps", str(last), "--student", "bns")
    runs[f"BNS, K = {last}"] = train(setting, f"bns-long-k{last}", *words, updates=setting.long)
    steps = ",".join(map(str, setting.steps))
    measured = evaluate(setting, "evaluation-longer", [*runs.values()], "classical", steps=steps)
    again = evaluate(
        setting, "evaluation-other-seeds", [*own.values()], "classical", steps=steps, seeds=setting.other_seeds
    )
    return [
        Experiment(
            "longer", "The quick recipe at its full length",
            f"What `gas-engine train --steps K` gives: {setting.long} updates instead of {setting.updates}.",
            learned=runs, evaluations=(measured,),
            table=("l1", "fd_data"), over="steps",
            claims=(
                Claim("GS is nearer than every classical solver at every K.", below("GS", kind="classical")),
                Claim(f"GS is nearer than BNS at K = {last}, where BNS was ahead after fewer updates.",
                      below("GS", ("BNS",))),
            ),
        ),
        Experiment(
            "other-seeds", "The same solvers on other seeds",
            "The quick recipe and the embedded network were chosen while looking at the held-out seeds of the other "
            f"tables. These, {setting.other_seeds}, served for no choice.",
            learned=own, evaluations=(again,), table=("l1",), over="steps",
            claims=(Claim("GS is nearer than every classical solver at every K.", below("GS", kind="classical")),),
        ),
    ]  # fmt: skip


def _kinds(setting: Setting, main: dict) -> Experiment:
    k = _first(setting)
    runs = {"relativistic": main[f"GAS, K = {k}"], "none (GS)": main[f"GS, K = {k}"]}
    for kind in ("non_saturating", "plain"):
        words = ("--steps", str(k), "--adversarial", "--adversarial-loss", kind)
        runs[kind.replace("_", "-")] = train(setting, f"gas-{kind.replace('_', '-')}-k{k}", *words)
    return Experiment(
        "gan-kinds", "Kinds of adversarial loss",
        "Table 6: the relativistic loss is best (ImageNet-256, K = 4: FID 5.38; plain GAN 6.49; GS 7.87).",
        learned=runs, evaluations=(evaluate(setting, "evaluation-gan-kinds", [*runs.values()]),), table=FD,
        claims=(Claim("The relativistic loss is the nearest to the data (FD).",
                      below("relativistic", ("non-saturating", "plain", "none (GS)"), "fd_data"),
                      "One seed each, and runs that are short for a discriminator."),),
    )  # fmt: skip


def _samples(setting: Setting, main: dict) -> Experiment:
    k, runs = _first(setting), {}
    for label, words in (("GS", ()), ("GAS", ("--adversarial",))):
        name = f"{slug(label)}-n88-k{k}"
        runs[f"{label}, 88 samples"] = train(setting, name, "--steps", str(k), *words, "--train-seeds", "0-87")
        runs[f"{label}, 1400 samples"] = main[f"{label}, K = {k}"]
    return Experiment(
        "data-size", "How many of the teacher's samples",
        "Table 12: GS does not care how many samples it learns from; GAS wants 5,000 (FFHQ, K = 4: FID 9.44 with "
        "1,400, 7.86 with 5,000).",
        learned=runs, evaluations=(evaluate(setting, "evaluation-data-size", [*runs.values()]),),
        table=("l1", "fd_data", "fd_teacher"), over="train_samples",
        claims=(Claim("GS with 88 samples is within 5 % of GS with 1,400, or moves less than GAS.",
                      moves_less("GS", "GAS", 0.05)),),
    )  # fmt: skip


def _bases(setting: Setting, main: dict) -> Experiment:
    runs = {}
    for k in setting.steps[:1]:
        for base in BASES:
            own = base == "dpmpp3m"
            run = train(setting, f"gs-{base}-k{k}", "--steps", str(k), "--base", base)
            runs[f"{base}, K = {k}"] = main[f"GS, K = {k}"] if own else run
    return Experiment(
        "base", "The base solver beneath the corrections",
        "An open question of the paper, whose base is DPM-Solver++(3M): does GS gain from another?",
        learned=runs, evaluations=(evaluate(setting, "evaluation-base", [*runs.values()]),),
        table=("l1", "rmse", "fd_teacher"),
        claims=(Claim("DPM-Solver++(3M) is the nearest.",
                      below("dpmpp3m", [base for base in BASES if base != "dpmpp3m"]),
                      "It is in FD to the teacher. From the worst base to the best, L1 falls by a sixth: after these "
                      "short runs GS hangs little on its base."),),
    )  # fmt: skip


def _schedule(main: dict) -> Experiment:
    k = next(iter(main)).rpartition(" ")[2]
    shown = ("GS", "GAS", "GS in S4S's form", "S4S-Alt", "LD3", "DyWeight", "BNS", "BELM")
    return Experiment(
        "schedule", "Learned times as they move",
        f"How the times of states move over training from the quadratic grid, K = {k}; dashed: what the net is told.",
        learned={label: main[f"{label}, K = {k}"] for label in shown},
        collect="histories", table=(), figure="histories",
    )  # fmt: skip


def _pictures(setting: Setting, main: dict) -> Experiment:
    k = str(_first(setting))
    of = {name: main[f"{name}, K = {k}"] for name in ("GS", "GAS", "GS in S4S's form")}
    drawn = side_by_side(setting, of, {"iPNDM": ("ipndm3", "--steps", k, "--grid", "quadratic")})
    return Experiment(
        "pictures", "Samples side by side",
        f"Figure 4: the same noise, K = {k}, beside the 20-evaluation teacher; below, errors on one scale.",
        learned=of, others=drawn, collect="samples", figure="samples", table=("l1",),
    )  # fmt: skip


def _spectrum(setting: Setting, main: dict, measured: Experiment) -> Experiment:
    k = _first(setting)
    return Experiment(
        "spectrum", "Fine detail",
        f"Figure 4: few-step samples lose fine detail. Radial power spectrum over the teacher's, K = {k}.",
        learned={label: main[f"{label}, K = {k}"] for label in ("GS", "GAS", "GS in S4S's form", "LD3")},
        evaluations=measured.evaluations, collect="spectra", table=(), figure="spectra",
    )  # fmt: skip


def _memory(setting: Setting, main: dict) -> Experiment:
    plans = []
    if setting.model == "digits":
        for (model, batch), known in PAPER_GB.items():
            for k in (min(known), max(known)) if len(setting.steps) > 1 else ():
                for adversarial in ((), ("--adversarial",)):
                    words = ("--model", model, "--batch", str(batch), "--steps", str(k), "--memory-budget", "80GiB")
                    name = f"{model}-{'gas' if adversarial else 'gs'}-k{k}"
                    plans.append(plan(setting, name, *words, *adversarial))
    runs = {label: run for label, run in main.items() if label.startswith(("GS, K", "GAS, K", "BELM, K"))}
    return Experiment(
        "memory", "Memory and time of an iteration",
        "Table 15: GB of an iteration on an H100 with the published code, beside what the planner predicts for ours in "
        "float32 (no GPU has measured it); and seconds of an iteration of the model here.",
        learned=runs, others=tuple(plans), collect="costs", figure="costs", table=("seconds",),
        note="Two commands ran at a time: seconds vary, bytes do not.",
    )  # fmt: skip
