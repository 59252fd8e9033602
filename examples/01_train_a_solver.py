"""A solver in thirty lines.

A student of four evaluations learns to end where a teacher of twenty ends, from the same noise. The network is
frozen; what is learned are the 39 numbers of the solver. What `gas-engine train` adds to this loop is comfort:
checkpoints, plans, pictures, comparisons.
"""

# %% The model, a teacher, and where its samples end
import torch

from gas_engine import GeneralizedSolver, MemoryPolicy, load_denoiser, rollout
from gas_engine.denoiser import seeded
from gas_engine.solvers.named import named_solver

denoiser = load_denoiser("digits")
teacher = named_solver("unipc", denoiser.schedule, steps=20, grid_name="quadratic", t_eps=1e-4)


def pairs(seeds):
    """Noise, classes and the teacher's samples; a seed is a sample, whatever the batch."""
    noise, classes = seeded(denoiser, seeds)
    with torch.no_grad():
        return noise, classes, rollout(denoiser, noise, teacher, classes)


noise, classes, target = pairs(range(192))
held_out, held_out_classes, wanted = pairs(range(50_000, 50_064))

# %% [markdown]
# The student begins at DPM-Solver++(3M) on the quadratic grid. `rollout` is differentiable in every number of the
# tableau; the policy keeps one network graph alive on the way back.

# %% The loop
student = GeneralizedSolver(steps=4, schedule=denoiser.schedule, start="quadratic")
optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
policy = MemoryPolicy(checkpoint_every=1)
order = torch.Generator().manual_seed(0)


def distance(solver):
    with torch.no_grad():
        return float((rollout(denoiser, held_out, solver, held_out_classes) - wanted).abs().mean())


at_first = distance(student.tableau())
for _ in range(60):
    rows = torch.randint(len(noise), (16,), generator=order)
    optimizer.zero_grad()
    x = rollout(denoiser, noise[rows], student.tableau(), classes[rows], policy)
    (x - target[rows]).abs().mean().backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()

# %% What it bought, on seeds that it has not seen
learned = distance(student.tableau())
ipndm = distance(named_solver("ipndm", denoiser.schedule, steps=4, grid_name="quadratic"))
print(f"L1 to the teacher at 4 evaluations: at first {at_first:.4f}, iPNDM {ipndm:.4f}, learned {learned:.4f}")
print("times", [round(float(t), 3) for t in student.times().detach()])
assert learned < ipndm < at_first
