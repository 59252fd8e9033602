"""Exact gradients in little memory.

A memory policy says what lives between a sampler's two passes. It changes bytes and time, and no digit of the
gradient.
"""

# %% A sampler of eight evaluations, and the gradient of a loss at its end
import torch

from gas_engine import BELMSolver, GeneralizedSolver, MemoryPolicy, load_denoiser, rollout
from gas_engine.denoiser import seeded
from gas_engine.memory import ByteTracker, checkpoint_blocks

torch.use_deterministic_algorithms(True)
denoiser = load_denoiser("digits")
noise, cond = seeded(denoiser, range(16))
MiB = 2**20


def gradient(solver, network, memory):
    """Peak bytes, network calls, and the gradient of the mean square with respect to every learned number."""
    calls = []
    handle = network.register_forward_pre_hook(lambda *_: calls.append(1))
    with ByteTracker() as tracker:
        x = rollout(network, noise, solver.tableau(), cond, memory)
        numbers = torch.autograd.grad(x.square().mean(), list(solver.parameters()))
    handle.remove()
    return tracker.peak, len(calls), torch.cat([g.flatten() for g in numbers])


# %% [markdown]
# All graphs, four of them, one of them; the states in host memory; and blocks of the network rebuilt as well. A kept
# graph saves the call that would rebuild it, so the calls count what is paid.

# %% The same gradient, from 8 graphs to a part of one
solver = GeneralizedSolver(steps=8, schedule=denoiser.schedule)
ways = {
    "all 8 graphs": (denoiser, MemoryPolicy(checkpoint_every=0)),
    "4 graphs": (denoiser, MemoryPolicy(checkpoint_every=4)),
    "1 graph": (denoiser, MemoryPolicy(checkpoint_every=1)),
    "1 graph, states in host memory": (denoiser, MemoryPolicy(checkpoint_every=1, trajectory="offload")),
    "1 graph, blocks rebuilt": (checkpoint_blocks(denoiser), MemoryPolicy(checkpoint_every=1)),
}
found = {name: gradient(solver, *way) for name, way in ways.items()}
for name, (peak, calls, _) in found.items():
    print(f"{name:32} {peak / MiB:6.2f} MiB at most, {calls:2} calls")

peaks = {name: peak for name, (peak, _, _) in found.items()}
exact = found["all 8 graphs"][2]
assert all(torch.equal(numbers, exact) for _, _, numbers in found.values())
assert peaks["all 8 graphs"] > 6 * peaks["1 graph"] > 6 * peaks["1 graph, blocks rebuilt"]
assert [calls for _, calls, _ in found.values()][:3] == [8, 12, 15]

# %% [markdown]
# A solver whose steps can be undone needs no trajectory: two states stay, and one byte an element and step that makes
# the way back exact to the bit. Its own kernel takes the steps, so the gradient differs by their rounding.

# %% A reversible solver keeps two states
two_states = BELMSolver(steps=24, schedule=denoiser.schedule)
gradients = {}
for where in ("keep", "reversible"):
    memory = MemoryPolicy(checkpoint_every=1, trajectory=where)
    with ByteTracker() as tracker:
        x = rollout(denoiser, noise, two_states.tableau(), cond, memory)
        numbers = torch.autograd.grad(x.square().mean(), list(two_states.parameters()))
    gradients[where] = torch.cat([g.flatten() for g in numbers])
    print(f"24 evaluations, {where:10} {tracker.by_phase['states'] / 1024:6.1f} KiB of states at the peak")

torch.testing.assert_close(gradients["reversible"], gradients["keep"], rtol=1e-5, atol=1e-6)
torch.use_deterministic_algorithms(False)
