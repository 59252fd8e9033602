"""Classical solvers by name, for the command line and for comparisons at a fixed number of evaluations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ..schedule import Schedule
from ..tableau import Tableau
from . import classical
from .grids import grid

Maker = Callable[[Schedule, Tensor], Tableau]

# One family, its variants: what a comparison picks the best of.
FAMILIES: dict[str, dict[str, Maker]] = {
    "DDIM": {"euler": classical.ddim},
    "Heun": {"heun": classical.heun},
    "DPM-Solver++(2M)": {
        "dpmpp2m": partial(classical.dpmpp, order=2),
        "dpmpp2m-full": partial(classical.dpmpp, order=2, lower_order_final=False),
    },
    "DPM-Solver++(3M)": {
        "dpmpp3m": partial(classical.dpmpp, order=3),
        "dpmpp3m-full": partial(classical.dpmpp, order=3, lower_order_final=False),
    },
    "UniPC": {
        f"unipc{order}-{variant}": partial(classical.unipc, order=order, variant=variant)
        for order in (2, 3)
        for variant in ("bh1", "bh2")
    },
    "iPNDM": {f"ipndm{order}": partial(classical.ipndm, order=order) for order in (2, 3, 4)},
    "DEIS": {f"deis{order}": partial(classical.deis, order=order) for order in (2, 3)},
}
ALIASES = {"ddim": "euler", "dpmpp1m": "euler", "unipc": "unipc3-bh1", "unipc2": "unipc2-bh1", "ipndm": "ipndm4",
           "unipc3": "unipc3-bh1", "deis": "deis3", "dpmpp": "dpmpp3m"}  # fmt: skip
MAKERS: dict[str, Maker] = {name: maker for family in FAMILIES.values() for name, maker in family.items()}


def checked_name(name: str, base: bool = False) -> str:
    """The name without aliases; ValueError for an unknown one, and for one that cannot be a student's ``base``."""
    key = ALIASES.get(name, name)
    if key not in MAKERS:
        kind, file = ("base solver", "") if base else ("solver", ", or a solver file")
        raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(sorted({*MAKERS, *ALIASES}))}{file}")
    if base and key == "heun":
        raise ValueError("heun takes two evaluations a step, so it is no base of K learned times; try dpmpp2m")
    return key


def named_solver(
    name: str, schedule: Schedule, steps: int, grid_name: str = "quadratic", t_eps: float = 1e-3
) -> Tableau:
    """The tableau of a solver by name, with ``steps`` network evaluations on a named grid.

    Heun takes two evaluations a step, so half as many steps (an odd number ends with Euler's). Raises ValueError for
    an unknown name or grid and for steps < 1.

        tableau = named_solver("unipc3-bh1", schedule, steps=6, grid_name="logSNR")
    """
    key = checked_name(name)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if key == "heun":
        times = grid(grid_name, schedule, (steps + 1) // 2, t_eps)
        return classical.heun(schedule, times, euler_final=steps % 2 == 1)
    return MAKERS[key](schedule, grid(grid_name, schedule, steps, t_eps))
