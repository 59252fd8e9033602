"""Solvers: functions and modules that return a ``Tableau``."""

from . import classical
from ._times import LearnedTimes
from .any_steps import AnyStepsSolver
from .belm import BELMSolver
from .files import load_solver, save_solver
from .generalized import GeneralizedSolver
from .grids import GRIDS, grid, noise_levels

__all__ = [
    "GRIDS",
    "AnyStepsSolver",
    "BELMSolver",
    "GeneralizedSolver",
    "LearnedTimes",
    "classical",
    "grid",
    "load_solver",
    "noise_levels",
    "save_solver",
]
