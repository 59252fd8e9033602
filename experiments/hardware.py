"""Tables of README.md on what a GPU measured: ops beside PyTorch's and beside a copy, updates within capped memory."""

from __future__ import annotations

from pathlib import Path

from experiment import Row
from jobs import ROOT
from tables import markdown, read

OPS = ROOT / "bench" / "results" / "ops_nvidia-h200_2026-11-28.csv"
CARDS = ROOT / "bench" / "results" / "cards_nvidia-h200_2026-11-28.csv"
DTYPES = ("float32", "bfloat16")
# op, size, what else tells its row, what it is called, and the row it is held against.
SHOWN: list[tuple[str, str, dict[str, str], str, str]] = [
    ("lincomb", "128MiB", {}, "`lincomb`, 10 states of 128 MiB", "eager twin"),
    ("adjoint_step", "128MiB", {}, "`adjoint_step`, the same", "eager twin"),
    *(
        (
            "group_norm_silu", size, {"form": form, "layout": layout}, f"`group_norm_silu`, {size}, {said}",
            "stock PyTorch",
        )
        for size in ("24x128x32x32", "32x320x64x64")
        for form, layout, said in (
            ("plain", "contiguous", "plain"), ("adaptive", "contiguous", "modulated"),
            ("adaptive", "channels_last", "modulated, channels_last"),
        )
    ),
    ("geglu", "16384x10240", {}, "`geglu`, 16384x10240", "stock"),
    ("silu_mul", "16384x10240", {}, "`silu_mul`, the same", "stock"),
    *(
        (op, "32x384x64x64", {"pass": "forward + backward", "layout": layout, **more}, f"`{op}`, {said}", other)
        for op, more, other in (
            ("bias_leaky_relu", {}, "stock"), ("resample2d", {"way": "down"}, "grouped convolution"),
        )
        for layout, said in (("NCHW", "32x384x64x64"), ("channels_last", "the same, channels_last"))
    ),
]  # fmt: skip


def gpu_ops(_: Path) -> str:
    """Device time beside PyTorch's ops, and the bandwidth as a part of a copy's, float32 / bfloat16."""
    rows = read(OPS)
    lines = [["float32 / bfloat16", "times faster than PyTorch", "of a copy's bandwidth"]]
    for op, size, more, name, other in SHOWN:
        found = [row for row in rows if row["op"] == op and row["size"] == size]
        found = [row for row in found if all(row.get(k) == v for k, v in more.items())]
        pairs = [
            [next(r for r in found if r["dtype"] == d and r["name"] == n) for n in ("native", other)] for d in DTYPES
        ]
        if not all(mine.get("of_copy") for mine, _ in pairs):
            continue
        ratios = [float(theirs.get("device_ratio") or theirs["ratio"]) for _, theirs in pairs]
        of_copy = [float(mine["of_copy"]) for mine, _ in pairs]
        lines.append([name, " / ".join(f"{v:.1f}" for v in ratios), " / ".join(f"{v:.2f}" for v in of_copy)])
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
