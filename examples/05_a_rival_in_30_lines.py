"""A rival in thirty lines.

A student is a function from parameters to a tableau. `LearnedTimes` has the times and the offsets of the told times;
this one adds an Adams-Bashforth step whose weights of the differences, 1/2 and 5/12 in theory, are learned for each
step.
"""

# %% The student
import torch
import torch.nn.functional as F
from torch import nn

from gas_engine import Schedule, Tableau, load_denoiser, rollout
from gas_engine.denoiser import seeded
from gas_engine.execution import Execution
from gas_engine.losses import distillation_loss
from gas_engine.solvers import LearnedTimes
from gas_engine.solvers.named import named_solver
from gas_engine.training.recipe import Recipe
from gas_engine.training.trainer import Trainer


class LearnedAdams(LearnedTimes):
    """x+ = (alpha+ / alpha) x + gain (e_0 + g_1 (e_0 - e_1) + g_2 (e_0 - 2 e_1 + e_2)), e_i the noise i steps back.

    With g = 1/2, 5/12 it is iPNDM of order 3; a sum of differences keeps every g consistent. 4 K - 1 numbers.
    """

    family = "adams"

    def __init__(self, steps: int, schedule: Schedule, t_eps: float = 1e-3, start: str = "quadratic") -> None:
        super().__init__(steps, schedule, t_eps, start)
        self.g = nn.Parameter(torch.tensor([[1 / 2, 5 / 12]] * steps, dtype=torch.float64))

    def tableau(self, prediction: str = "data") -> Tableau:
        times = self.times()
        alpha, sigma, lam = self.schedule(times)
        gain = -sigma[1:] * torch.expm1(lam.diff())
        # Weights of e_2, e_1, e_0 in each of the differences; the first steps have fewer.
        differences = torch.tensor([[0, 0, 1], [0, -1, 1], [1, -2, 1]], dtype=torch.float64)
        rows = []
        for n in range(self.steps):
            order = min(n + 1, 3)
            lags = differences[0] + (self.g[n, : order - 1, None] * differences[1:order]).sum(0)
            rows.append(F.pad(gain[n] * lags[3 - order :], (n + 1 - order, self.steps - 1 - n)))
        solver = Tableau(
            torch.diag(alpha[1:] / alpha[:-1]), torch.stack(rows), self.told_times(times),
            prediction="noise", nodes=times, schedule=self.schedule,
        )  # fmt: skip
        return solver.fold(prediction)


# %% [markdown]
# Before it learns anything it is iPNDM: the tableau says so, and so does every sample.

# %% Theory first
denoiser = load_denoiser("digits")
student = LearnedAdams(4, denoiser.schedule)
classical = named_solver("ipndm3", denoiser.schedule, 4, "quadratic").fold("data")
assert torch.allclose(student.tableau().A, classical.A) and torch.allclose(student.tableau().B, classical.B)

# %% Trained by the trainer that trains every other student
noise, cond = seeded(denoiser, range(192))
with torch.no_grad():
    target = rollout(denoiser, noise, named_solver("unipc", denoiser.schedule, 20, "quadratic", 1e-4), cond)
recipe = Recipe(50, 16, 5e-3, "cosine", ema=0.9, start_grid="")
trainer = Trainer(denoiser, student, list(range(192)), target, distillation_loss("l1"), recipe, Execution())


def distance() -> float:
    with torch.no_grad():
        return float((rollout(denoiser, noise, trainer.average.tableau(), cond) - target).abs().mean())


before = distance()
while not trainer.finished:
    trainer.update()
after = distance()
print(f"L1 to the teacher at 4 evaluations: {before:.4f} as iPNDM, {after:.4f} with {trainer.step} updates")
assert after < before
