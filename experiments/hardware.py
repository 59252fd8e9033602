"""Tables of README.md from the files of ``bench/results``: ops and memory on a CPU, ops and capped cards on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiment import Row
from jobs import ROOT
from tables import markdown, read

BENCHES = ROOT / "bench" / "results"
CPU_OPS = BENCHES / "ops_amd-epyc_2026-11-30.csv"
MEMORY = BENCHES / "memory_amd-epyc_2026-11-30.csv"
GPU_MEMORY = BENCHES / "memory_nvidia-h200_2026-11-28.csv"
CHECKS = BENCHES / "checks_nvidia-h200_2026-11-28.csv"
GPU_OPS = BENCHES / "ops_nvidia-h200_2026-11-28.csv"
ADVERSARIAL = BENCHES / "adversarial_amd-epyc_2026-11-21.csv"
BUDGET = BENCHES / "budget_amd-epyc_2026-11-21.csv"
CARDS = BENCHES / "cards_nvidia-h200_2026-11-28.csv"
DTYPES = ("float32", "bfloat16")
BOTH = {"pass": "forward + backward"}
OLDER = {"taps": "1331"}  # of files without the column
# What tells a line's rows, what it is called, the row that is ours, and the one that it is held against.
Line = tuple[dict[str, str], str, str, str]


def _normed(size: str, *kinds: tuple[str, str, str]) -> list[Line]:
    told = {"op": "group_norm_silu", "size": size}
    return [
        ({**told, "form": form, "layout": layout}, f"`group_norm_silu`, {size}, {said}", "native", "stock PyTorch")
        for form, layout, said in kinds
    ]


PLAIN = ("plain", "contiguous", "plain")
MODULATED = ("adaptive", "contiguous", "modulated")
MODULATED_LAST = ("adaptive", "channels_last", "modulated, channels_last")


def _laid_out(op: str, size: str, other: str, more: dict[str, str], said: str = "") -> list[Line]:
    told = {"op": op, "size": size, **BOTH, **more}
    return [
        ({**told, "layout": layout}, f"`{op}`, {size}{said}{name}", "native", other)
        for layout, name in (("NCHW", ""), ("channels_last", ", channels_last"))
    ]


ON_CPU: list[Line] = [
    *(
        ({"op": op, "size": size}, f"`{op}`, 10 states of {size}", "native", "eager twin")
        for size in ("16MiB", "24x3x32x32") for op in ("lincomb", "adjoint_step")
    ),
    *(
        ({"op": op, "size": "16MiB"}, f"`{op}`, 10 states of 16MiB, than copying ten", "native", "copies")
        for op in ("lincomb", "adjoint_step")
    ),
    *_normed("24x128x32x32", PLAIN, MODULATED, ("plain", "channels_last", "plain, channels_last"), MODULATED_LAST),
    *_normed("8x256x16x16", PLAIN, MODULATED),
    ({"op": "geglu"}, "`geglu`, 1024x2560", "native", "stock"),
    ({"op": "silu_mul"}, "`silu_mul`, 1024x2560", "native", "stock"),
    *(line for size in ("8x384x64x64", "8x768x16x16", "8x768x4x4")
      for line in _laid_out("bias_leaky_relu", size, "stock", {})),
    *(line for size in ("8x384x64x64", "8x128x32x32", "8x768x8x8") for way in ("down", "up")
      for line in _laid_out("resample2d", size, "grouped convolution", {"way": way, "taps": "1331"}, f", {way}")),
    *(line for way in ("down", "up")
      for line in _laid_out("resample2d", "8x384x64x64", "grouped convolution", {"way": way, "taps": "11"},
                            f", {way}, two taps")),
    *(
        ({"op": "reversible_step", "size": size}, f"`reversible_step`, {size}", "step with codes",
         "eager twin of the step")
        for size in ("16MiB", "24x3x32x32")
    ),
    ({"op": "conv_frozen"}, "`conv_frozen`, 8x128x32x32", "conv_frozen", "torch conv2d"),
]  # fmt: skip
ON_GPU: list[Line] = [
    *(({"op": op, "size": "128MiB"}, f"`{op}`, 10 states of 128MiB", "native", "eager twin")
      for op in ("lincomb", "adjoint_step")),
    *_normed("24x128x32x32", PLAIN, MODULATED, MODULATED_LAST),
    *_normed("32x320x64x64", PLAIN, MODULATED, MODULATED_LAST),
    *(({"op": op, "size": "16384x10240"}, f"`{op}`, 16384x10240", "native", "stock") for op in ("geglu", "silu_mul")),
    *_laid_out("bias_leaky_relu", "32x384x64x64", "stock", {}),
    *_laid_out("resample2d", "32x384x64x64", "grouped convolution", {"way": "down", "taps": "1331"}, ", down"),
]  # fmt: skip


def cpu_ops(_: Path) -> str:
    """How many times as fast as PyTorch, float32 / bfloat16, with the backward pass where there is one."""
    lines = [["float32 / bfloat16, two CPU threads", "times faster than PyTorch"]]
    for name, pairs in _pairs(CPU_OPS, ON_CPU):
        lines.append([name, " / ".join(_times(theirs["ratio"]) for _, theirs in pairs)])
    return markdown(lines) if len(lines) > 1 else ""


def gpu_ops(_: Path) -> str:
    """Device time beside PyTorch's ops, and the bandwidth as a part of a copy's, float32 / bfloat16."""
    lines = [["float32 / bfloat16", "times faster than PyTorch", "of a copy's bandwidth"]]
    for name, pairs in _pairs(GPU_OPS, ON_GPU):
        ratios = [_times(theirs.get("device_ratio") or theirs["ratio"]) for _, theirs in pairs]
        lines.append([name, " / ".join(ratios), " / ".join(f"{float(mine['of_copy']):.2f}" for mine, _ in pairs)])
    return markdown(lines) if len(lines) > 1 else ""


def gpu_iteration(_: Path) -> str:
    """Time of an update of the CIFAR-10 network in eager mode on a GPU, against stock layers."""
    rows = [row for row in read(GPU_MEMORY) if row["what"] == "seconds, K = 10"]
    lines = [[f"an update of the CIFAR-10 network, K = 10, batch {row['batch']}", "ms", "ratio"] for row in rows[:1]]
    return markdown([*lines, *([row["name"], row["p50_ms"], f"{float(row['ratio']):.2f}"] for row in rows)])


def checks(_: Path) -> str:
    """What ran on a GPU without a finding."""
    lines = [["on an H200", "ended without a finding", "of"]]
    return markdown([*lines, *([row["what"], row["passed"], row["of"]] for row in read(CHECKS))])


def _pairs(path: Path, lines: Sequence[Line]) -> list[tuple[str, list[tuple[Row, Row]]]]:
    """The name of each line, and for each dtype its row and the other's; lines that were not measured are left out."""
    rows, found = read(path), []
    for told, name, mine, other in lines:
        here = [row for row in rows if all(row.get(k, OLDER.get(k)) == v for k, v in told.items())]
        named = {(row["dtype"], row["name"]): row for row in here}
        if all((dtype, which) in named for dtype in DTYPES for which in (mine, other)):
            found.append((name, [(named[dtype, mine], named[dtype, other]) for dtype in DTYPES]))
    return found


def _times(ratio: str) -> str:
    return f"{float(ratio):.2f}" if float(ratio) < 10 else f"{float(ratio):.1f}"


CALLS = {
    "cifar10": "a call of CIFAR-10's EDM network",
    "ffhq64": "FFHQ-64's",
    "adm64": "ImageNet-64's (ADM)",
    "sd15": "SD 1.5's U-Net, 64x64 latents (diffusers, with SDPA)",
    "sd3": "SD 3's transformer, 128x128 latents",
    "flux": "FLUX.1-dev's transformer, 128x128 latents",
}
WAYS = ("stock", "lean", "blocks", "nested")


def memory(_: Path) -> str:
    """MiB that a call keeps, or peaks at with blocks; MiB and time of an iteration of the CIFAR-10 network."""
    rows = read(MEMORY)
    calls = {row["name"]: row for row in rows if row["what"] == "MiB a call"}
    lines = [["", "stock layers", "`lean`", "`lean`, blocks", "nested"]]
    lines += [[said, *(_mib(calls[name].get(way)) for way in WAYS)] for name, said in CALLS.items() if name in calls]
    for title, what, figure, form in (
        ("an iteration of CIFAR-10's, K = 10", "peak MiB, K = 10", "peak", _mib),
        ("its time", "seconds, K = 10", "ratio", lambda v: f"{float(v):.2f}" if v else ""),
    ):
        of = {row["name"]: row.get(figure, "") for row in rows if row["what"] == what}
        if of:
            every = [form(of.get(f"{kind}, all graphs")) for kind in ("stock", "lean")]
            one = [form(of.get(f"lean, one graph{more}")) for more in ("", ", blocks", ", nested")]
            lines += [[f"{title}, all graphs", *every, "", ""], [f"{title}, one graph", "", *one]]
    return markdown(lines) if len(lines) > 1 else ""


def _mib(value: str | None) -> str:
    if not value:
        return ""
    return f"{float(value):.1f}" if float(value) < 20 else f"{float(value):,.0f}"


STEPS = {
    "discriminator": {
        "double backward, joint, stock layers": "joint double backward, as published",
        "double backward, a side at a time": "double backward, a side at a time",
        "forward over reverse, pairs of one": "forward over reverse, pairs of one",
        "piecewise": "**piecewise**",
    },
    "generator": {"stock layers": "the generator's step, stock layers", "lean": "the generator's step, lean"},
}


def adversarial(_: Path) -> str:
    """MiB and time of the steps of adversarial training, by how the penalties' gradient is taken."""
    found = {(row["what"].split()[0], row["name"], "seconds" in row["what"]): row for row in read(ADVERSARIAL)}
    lines = [["a step, with Adam", "peak MiB, gradients included", "time", "seconds"]]
    for step, names in STEPS.items():
        for name, said in names.items():
            peak, time = found[step, name, False], found[step, name, True]
            lines.append([said, _mib(peak["peak_mib"]), _times(time["ratio"]), f"{float(time['p50_ms']) / 1e3:.1f}"])
    return markdown(lines)


def budget(_: Path) -> str:
    """Bytes and seconds of an update within a budget, on the CPU, and the time of the plain loop."""
    lines = [["on two CPU threads", "planned", "peak", "seconds"]]
    for row in read(BUDGET):
        planned, seconds = f"{row['execution']}, {row['budget_gib']} GiB", (row["seconds"], row["plain_seconds"])
        lines.append([planned, _gib(row, "planned_gib"), _gib(row, "peak_gib"), f"{float(seconds[0]):.0f}"])
        lines.append(["the plain loop", "", "", f"{float(seconds[1]):.0f}"])
    return markdown(lines)


def cards(_: Path) -> str:
    """Bytes and seconds of an update of full-size networks, planned and measured with the allocator capped."""
    lines = [["network", "update", "cap", "weights", "planned", "measured", "seconds", "gradient against float32"]]
    for row in read(CARDS):
        seconds = f"{float(row['seconds']):.2g}" if row.get("seconds") else "-"
        lines.append(
            [row["name"], row["kind"], f"{row['card_gib']} GiB", row["weights"], _gib(row, "predicted_gib"),
             _gib(row, "measured_gib"), seconds, row.get("gradient_error") or ""]
        )  # fmt: skip
    return markdown(lines)


def _gib(row: Row, column: str) -> str:
    return f"{float(row[column]):.2f} GiB" if row.get(column) else "-"
