"""Your own model.

Whatever predicts noise, data, a velocity or a flow is a `Denoiser`, and then everything else of this package applies.
Here the network is the exact denoiser of a few points in the plane, so that the true answer is known.
"""

# %% A callable: x, a time, a condition -> its output
import torch

from gas_engine import Denoiser, GeneralizedSolver, Schedule, loss_backward, rollout
from gas_engine.conditioning import Classes
from gas_engine.denoiser import seeded
from gas_engine.solvers import classical, grid

schedule = Schedule.flow(shift=1.0)  # x_t = (1 - t) data + t noise
angles = torch.arange(6) * (torch.pi / 3)
points = torch.stack([angles.cos(), angles.sin()], 1)  # [6, 2]


class Network(torch.nn.Module):
    """F = noise - data of the mixture of a class's three points: what a flow network predicts."""

    def __init__(self):
        super().__init__()
        self.register_buffer("of_class", torch.stack([points[::2], points[1::2]]))  # [2, 3, 2]

    def forward(self, x, t, cond):
        alpha, sigma = (value.to(x.dtype) for value in (schedule.alpha(t), schedule.sigma(t)))
        centres = self.of_class[cond]
        far = (x[:, None] - alpha * centres).square().sum(-1) / (2 * sigma**2 + alpha**2 * 0.1)
        data = (torch.softmax(-far, 1)[..., None] * centres).sum(1)
        return (x - alpha * data) / sigma - data


# %% [markdown]
# `shape` is that of one state, `"flow"` names what comes out, `conditioning` says what a seed is told. The
# time arrives as a float64 scalar in the schedule's t; keep it differentiable, and do not round it.

# %% A denoiser, and samples of it
denoiser = Denoiser(Network(), schedule, "flow", shape=(2,), conditioning=Classes(2), name="six points")
noise, labels = seeded(denoiser, range(256))
teacher = classical.unipc(schedule, grid("uniform", schedule, 40, 1e-3))
with torch.no_grad():
    wanted = rollout(denoiser, noise, teacher, labels)
nearest = torch.cdist(wanted, points).argmin(1)
assert torch.equal(nearest % 2, labels)  # every sample is at a point of its class

# %% A student of three evaluations
student = GeneralizedSolver(steps=3, schedule=schedule)
optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
errors = []
for _ in range(150):
    optimizer.zero_grad()
    losses = loss_backward(
        denoiser, noise, student.tableau(denoiser.prediction), lambda x, rows: (x - wanted[rows]).abs().mean(1), labels
    )  # fmt: skip
    optimizer.step()
    errors.append(float(losses.mean()))
print(f"mean distance to the teacher: {errors[0]:.4f} with DPM-Solver++(3M), {errors[-1]:.4f} learned")
assert errors[-1] < errors[0] / 2

# %% [markdown]
# For the command line, put a function that returns the denoiser into a module: `--model mymodel:make_denoiser`.
