"""Solvers: functions and modules that return a ``Tableau``."""

from . import classical
from ._times import LearnedTimes
from .any_steps import AnyStepsSolver
from .belm import BELMSolver
from .bns import BNSSolver
from .dyweight import DyWeightSolver
from .files import FAMILIES, load_solver, save_solver
from .generalized import GeneralizedSolver
from .grids import GRIDS, grid, noise_levels
from .ld3 import LD3Solver
from .s4s import AlternatingS4SSolver, S4SSolver

__all__ = [
    "FAMILIES",
    "GRIDS",
    "AlternatingS4SSolver",
    "AnyStepsSolver",
    "BELMSolver",
    "BNSSolver",
    "DyWeightSolver",
    "GeneralizedSolver",
    "LD3Solver",
    "LearnedTimes",
    "S4SSolver",
    "classical",
    "grid",
    "load_solver",
    "noise_levels",
    "save_solver",
]
