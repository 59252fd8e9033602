"""Solvers: functions and modules that return a ``Tableau``."""

from . import classical
from .files import load_solver, save_solver
from .generalized import GeneralizedSolver
from .grids import GRIDS, grid, noise_levels

__all__ = ["GRIDS", "GeneralizedSolver", "classical", "grid", "load_solver", "noise_levels", "save_solver"]
