"""Pictures of samples, learned times and tableaux, as PNG files written atomically."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from torch import Tensor, nn

from .denoiser import Denoiser
from .files import atomic
from .schedule import Schedule
from .tableau import Tableau


def can_draw(denoiser: Denoiser) -> None:
    """Reads what pictures need. Raises ValueError where it cannot be read: before the hours that states take."""
    if isinstance(denoiser.decoder, nn.Module):
        next(denoiser.decoder.parameters(), None)


@torch.no_grad()
def pictures_of(denoiser: Denoiser, states: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Pictures of states [N, *shape], on the CPU: of latents, decoded on ``device``, one by one."""
    decoder = denoiser.decoder
    if decoder is None:
        return states
    if isinstance(decoder, nn.Module):
        decoder = decoder.to(device)
    pictures = torch.cat([decoder(state[None].to(device)).float().cpu() for state in states])
    if isinstance(decoder, nn.Module):
        decoder.to("cpu")
    return pictures


def image_rows(path: Path, rows: list[tuple[str, Tensor]], title: str = "", columns: int = 12) -> None:
    """Labelled rows of images, [N, C, H, W] in [-1, 1]; a row whose label starts with "|" is drawn as an error.

    Errors are the mean over channels of |x|, all rows on one colour scale that reaches their 99.5 % quantile.
    """
    columns = min(columns, max(len(images) for _, images in rows))
    errors = [images[:columns].abs().mean(1) for label, images in rows if label.startswith("|")]
    top = float(torch.quantile(torch.cat(errors).flatten(), 0.995)) if errors else 1.0
    margin = max(1.5, 0.075 * max(len(label) for label, _ in rows))  # inches
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(0.85 * columns + margin + 0.2, 0.87 * len(rows) + 0.7), squeeze=False
    )  # fmt: skip
    drawn = None
    for line, (label, images) in zip(axes, rows, strict=True):
        for axis in line:
            axis.axis("off")
        for axis, image in zip(line, images, strict=False):
            if label.startswith("|"):
                drawn = axis.imshow(image.abs().mean(0), cmap="magma", vmin=0, vmax=max(top, 1e-6))
            else:
                axis.imshow(_displayable(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        line[0].text(-0.12, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    figure.suptitle(title, fontsize=11)
    left = margin / figure.get_figwidth()
    right = 1 - (0.75 if errors else 0.1) / figure.get_figwidth()
    figure.subplots_adjust(
        left=left, right=right, top=1 - 0.45 / figure.get_figheight(), bottom=0.02, wspace=0.06, hspace=0.06
    )
    if drawn is not None:
        bar_axis = figure.add_axes((right + 0.012, 0.06, 0.012, 0.55))
        bar = figure.colorbar(drawn, cax=bar_axis)
        bar.ax.tick_params(labelsize=7)
    save_figure(figure, path)


def schedule_plot(path: Path, schedule: Schedule, times: dict[str, Tensor], told: dict[str, Tensor]) -> None:
    """Times of each solver's states against sigma, one line each, with the told times as crosses."""
    figure, (by_step, by_sigma) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for index, (name, t) in enumerate(times.items()):
        t = t.detach()
        by_step.plot(t, "o-", label=name, ms=4)
        alpha, sigma, _ = schedule(t)
        by_sigma.semilogx(sigma / alpha, torch.full_like(t, -index), "o", label=name)
        if name in told:
            by_step.plot(told[name].detach(), "kx", ms=7, label=f"{name}: told to the network")
            alpha, sigma, _ = schedule(told[name].detach())
            by_sigma.semilogx(sigma / alpha, torch.full_like(alpha, -index), "kx", ms=7)
    by_step.set(xlabel="state", ylabel="time t", title="times")
    by_step.xaxis.get_major_locator().set_params(integer=True)
    by_step.legend(fontsize=8)
    by_sigma.set(xlabel="noise-to-signal ratio sigma / alpha", title="noise levels", ylim=(-len(times), 1))
    by_sigma.set_yticks([-index for index in range(len(times))], list(times))
    save_figure(figure, path)


def tableau_plot(path: Path, tableau: Tableau, start: Tableau | None = None) -> None:
    """Heat maps of A and B, and of their change since ``start``."""
    panels = [("A", tableau.A), ("B", tableau.B)]
    if start is not None:
        panels += [("A, learned change", tableau.A - start.A), ("B, learned change", tableau.B - start.B)]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.4), constrained_layout=True)
    steps = tableau.steps
    for axis, (title, matrix) in zip(axes, panels, strict=True):
        values = matrix.detach().numpy()
        limit = max(float(np.abs(values).max()), 1e-12)
        masked = np.ma.masked_where(np.triu(np.ones_like(values), 1) > 0, values)
        axis.imshow(masked, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set(title=title, xlabel="from j", ylabel="to n + 1", xticks=range(steps), yticks=range(steps))
        axis.set_yticklabels([str(n + 1) for n in range(steps)])
        if steps <= 8:
            for n in range(steps):
                for j in range(n + 1):
                    dark = abs(values[n, j]) > 0.6 * limit
                    axis.text(
                        j, n, f"{values[n, j]:.2f}", ha="center", va="center", fontsize=7, color="w" if dark else "k"
                    )
    save_figure(figure, path)


def history_plot(
    path: Path, updates: ArrayLike, times: ArrayLike, told: ArrayLike, a: ArrayLike, b: ArrayLike, title: str = ""
) -> None:
    """Learned times over training (told times dashed), and how far every entry of A and B moved, a panel per step.

    R readings of a solver of K steps: updates [R], times [R, K+1], told [R, K], a and b [R, K, K]. Raises ValueError
    for other shapes or no reading.
    """
    updates, times, told, a, b = (np.asarray(v, dtype=float) for v in (updates, times, told, a, b))
    readings, steps = len(updates), times.shape[-1] - 1
    shapes = {"times": (readings, steps + 1), "told": (readings, steps), "a": (readings, steps, steps)}
    shapes["b"] = shapes["a"]
    for (name, shape), value in zip(shapes.items(), (times, told, a, b), strict=True):
        if readings == 0 or steps < 1 or value.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} for {readings} readings, got {list(value.shape)}")
    figure = plt.figure(figsize=(max(6.5, 1.9 * steps + 0.8), 7.2), constrained_layout=True)
    grid = figure.add_gridspec(3, steps, height_ratios=(1.5, 1, 1))
    top = figure.add_subplot(grid[0, :])
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, steps + 1))
    for n in range(steps + 1):
        top.plot(updates, times[:, n], color=colors[n], label="state" if n == 0 else None)
        if n < steps:
            top.plot(updates, told[:, n], "--", color=colors[n], lw=1, label="told to the network" if n == 0 else None)
    top.set(ylabel="time t", title=title or "learned times", xlabel="update")
    top.legend(fontsize=8, loc="best")
    lags = plt.get_cmap("turbo")(np.linspace(0.05, 0.95, max(steps, 2)))
    for line, (name, values) in enumerate((("A", a - a[0]), ("B", b - b[0])), start=1):
        limit = 1.3 * max(float(np.abs(np.tril(values)).max()), 1e-12)
        mark = float(f"{limit / 1.5:.0e}")
        ticks = [-mark, -mark / 10, 0, mark / 10, mark]
        for n in range(steps):
            axis = figure.add_subplot(grid[line, n])
            for j in range(n + 1):
                axis.plot(updates, values[:, n, j], color=lags[n - j], lw=1.2, label=f"{n - j}")
            axis.axhline(0, color="0.8", lw=0.8, zorder=0)
            # Early steps move little, late ones much: linear up to a tenth, then logarithmic.
            axis.set_yscale("symlog", linthresh=mark / 10)
            axis.set_yticks(ticks, [f"{v:g}" for v in ticks])
            axis.minorticks_off()
            axis.set(ylim=(-limit, limit))
            axis.set_title(f"{name}, step {n + 1}", fontsize=9)
            axis.tick_params(labelsize=7, labelleft=n == 0)
            axis.xaxis.set_major_locator(plt.MaxNLocator(3, integer=True))
            if n == 0:
                axis.set_ylabel("moved by", fontsize=8)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], title="lag", fontsize=8, title_fontsize=8, loc="outside right lower")
    save_figure(figure, path)


def _displayable(image: Tensor) -> Tensor:
    image = (image.clamp(-1, 1) + 1) / 2
    return image[0] if image.shape[0] not in (3, 4) else image[:3].permute(1, 2, 0)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically and forget it."""
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
