"""gas_engine: learn few-step ODE solvers for diffusion and flow models, with exact gradients in little memory."""

from importlib.metadata import PackageNotFoundError, version

from .adapters import load_denoiser
from .denoiser import Denoiser, EDMDenoiser
from .gradients import loss_backward
from .guidance import guided
from .memory import MemoryPolicy
from .rollout import rollout
from .schedule import Schedule
from .solvers import BELMSolver, GeneralizedSolver, load_solver, save_solver
from .tableau import Tableau

try:
    __version__ = version("gas_engine")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "BELMSolver",
    "Denoiser",
    "EDMDenoiser",
    "GeneralizedSolver",
    "MemoryPolicy",
    "Schedule",
    "Tableau",
    "guided",
    "load_denoiser",
    "load_solver",
    "loss_backward",
    "rollout",
    "save_solver",
]
