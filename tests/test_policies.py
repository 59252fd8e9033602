"""Every memory policy gives the same loss and gradients; what differs is bytes and network calls."""

from __future__ import annotations

import gc
import itertools
import sys

import pytest
import torch
from torch import Tensor, nn
from toy import SHAPE, mixture, noise
from twin import plain_rollout, relative

from gas_engine import BELMSolver, Denoiser, GeneralizedSolver, MemoryPolicy, Schedule, Tableau, guided, rollout
from gas_engine.denoiser import seeded
from gas_engine.gradients import loss_backward
from gas_engine.memory import BitsLost, ByteTracker, offload
from gas_engine.memory.reversal import Reversible
from gas_engine.memory.trajectory import Coefficients
from gas_engine.solvers.named import named_solver
from gas_engine.tableau import PREDICTIONS

VP = Schedule.vp_linear(0.1, 20.0)
BANDS = [MemoryPolicy(1, "reversible"), MemoryPolicy(0, "reversible"), MemoryPolicy(1, "reversible", carry=True)]
ANY = [
    MemoryPolicy(k, where, split_guidance=split, loss_alone=alone)
    for k, where, split, alone in itertools.product((0, 1, 2), ("keep", "offload"), (False, True), (False, True))
]


def nudged(solver, size=0.03):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in solver.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return solver


def gradients(denoiser, solver, x, cond, memory, run=rollout):
    solver.zero_grad()
    x = x.clone().requires_grad_()
    options = {} if memory is None else {"memory": memory}
    out = run(denoiser, x, solver.tableau(denoiser.prediction), cond, **options)
    (out.sin().sum() + out.square().mean()).backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in solver.parameters() if p.numel())]


def same(got, wanted, tolerance):
    return all(relative(a, b) < tolerance for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_policy_gives_the_gradients_of_plain_autograd(prediction):
    schedule = Schedule.flow(2.0) if prediction == "flow" else VP
    denoiser, x, cond = mixture(schedule, prediction, classes=5), noise(3), torch.tensor([1, 3, 0])
    model = guided(denoiser, 1.7, torch.tensor([2]))
    for solver, policies in (
        (nudged(GeneralizedSolver(4, schedule)), ANY),
        (nudged(BELMSolver(4, schedule)), ANY[:6] + BANDS[:2]),
    ):
        for network in (denoiser, model):
            wanted = gradients(network, solver, x, cond, None, plain_rollout)
            for memory in policies:
                assert same(gradients(network, solver, x, cond, memory), wanted, 1e-11), memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policies_of_the_same_arithmetic_agree_bit_for_bit(dtype):
    """Offload adds its slices' products in another order; all the rest is the same to the bit."""
    denoiser, x, cond = mixture(classes=5), noise(3, dtype), torch.tensor([1, 3, 0])
    for network in (denoiser, guided(denoiser, 1.7, torch.tensor([2]))):
        for split in (False, True):
            solver = nudged(GeneralizedSolver(4, VP))
            got = {m: gradients(network, solver, x, cond, m) for m in ANY if m.split_guidance is split}
            first = next(iter(got.values()))
            for memory, values in got.items():
                exact = 2 if memory.trajectory == "offload" else len(first)
                assert all(torch.equal(a, b) for a, b in zip(values[:exact], first[:exact], strict=True)), memory
                assert same(values, first, 1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
@pytest.mark.parametrize("memory", BANDS, ids=["codes", "codes, all graphs", "carry"])
def test_reversible_states_come_back_to_the_bit(steps, memory, monkeypatch):
    """The inputs of the rebuilt evaluations are those of the way there, on a float32 network."""
    inner, there, back = mixture(), [], []

    def network(x, t, cond):
        (back if torch.is_grad_enabled() else there).append(x.detach().clone())
        return inner(x, t)

    monkeypatch.setattr(sys.modules["gas_engine.rollout"]._Network, "check_that_it_repeats", lambda *args: None)
    x, solver = noise(16, torch.float32), nudged(BELMSolver(steps, VP, start="quadratic"))
    rollout(Denoiser(network, VP, "data", SHAPE), x, solver.tableau(), memory=memory).sum().backward()
    if memory.checkpoint_every == 0:
        assert not there and len(back) == steps
    else:  # the last one is kept
        assert len(there) == steps - 1 and len(back) == steps
        assert all(torch.equal(a, b) for a, b in zip(there, back[:0:-1], strict=True))


def test_reversible_twenty_steps_on_the_embedded_model_and_an_edm_network(tiny):
    from gas_engine import load_denoiser

    for denoiser in (load_denoiser("digits"), tiny(1e-3)):
        x, cond = seeded(denoiser, range(4))
        solver, meter = BELMSolver(20, denoiser.schedule, start="quadratic"), BitsLost()
        codes = MemoryPolicy(trajectory="reversible", meter=meter)
        carry = MemoryPolicy(trajectory="reversible", carry=True)
        wanted = gradients(denoiser, solver, x, cond, MemoryPolicy())
        for memory in (codes, carry):
            got = gradients(denoiser, solver, x, cond, memory)
            flat, want = (torch.cat([g.double().flatten() for g in v]) for v in (got, wanted))
            assert relative(flat, want) < 1e-5, relative(flat, want)
        assert 0.1 < meter.mean < 8 and meter.escaped < 0.01


def walk(dtype=torch.float32, steps=20, elements=4096, carry=False):
    """A reversible trajectory of made-up outputs, and the states it passed."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(elements, generator=generator).to(dtype)
    outputs = [torch.randn(elements, generator=generator).to(dtype) for _ in range(steps)]
    tableau = nudged(BELMSolver(steps, VP)).tableau()
    a, b = tableau.A.detach(), tableau.B.detach()
    trajectory = Reversible(Coefficients(a, b, None, x.device, True), a, b, x, carry, None)
    seen = []
    for n, output in enumerate(outputs):
        seen.append(trajectory.input(n).clone())
        trajectory.step(n, output)
    return trajectory, outputs, seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_walk_back_passes_the_same_states(dtype):
    trajectory, outputs, seen = walk(dtype)
    result = trajectory.take(20)
    trajectory.turn(torch.ones_like(result), result)
    for j in reversed(range(20)):
        assert torch.equal(trajectory.input(j), seen[j])
        trajectory.adjoint(j, outputs[j])
        trajectory.settle(j, None)


def test_a_network_that_does_not_repeat_is_refused():
    count = itertools.count()

    def drifting(x, t, cond):
        return x * (1 + 1e-6 * next(count))

    denoiser = Denoiser(drifting, VP, "data", SHAPE)
    solver = BELMSolver(3, VP)
    for every in (0, 1, 0):  # and again, since it was not found to repeat
        reversible = MemoryPolicy(every, "reversible")
        with pytest.raises(RuntimeError, match="repeat to the bit, and two calls of it differ by up to"):
            rollout(denoiser, noise(2, torch.float32), solver.tableau(), memory=reversible)


@pytest.mark.parametrize(("carry", "factor"), [(False, 1.001), (True, 1.001), (True, 1.000_001)])
def test_a_walk_that_ends_elsewhere_is_refused(carry, factor):
    """The recovered first state is held against the noise of the seed."""
    calls = itertools.count()

    def late(x, t, cond):
        return x * (1.0 if next(calls) < 5 else factor)

    solver, reversible = BELMSolver(4, VP), MemoryPolicy(trajectory="reversible", carry=carry)
    out = rollout(Denoiser(late, VP, "data", SHAPE), noise(2, torch.float32), solver.tableau(), memory=reversible)
    with pytest.raises(RuntimeError, match="not the one it started from"):
        out.sum().backward()


def test_a_dense_tableau_is_refused():
    reversible = MemoryPolicy(trajectory="reversible")
    with pytest.raises(ValueError, match="a dense solver, the Generalized Solver included, is not reversible"):
        rollout(mixture(), noise(), nudged(GeneralizedSolver(4, VP)).tableau(), memory=reversible)
    euler = named_solver("euler", VP, 3).fold("data")
    leaf = Tableau(euler.A.clone().requires_grad_(), euler.B, euler.t_net)
    with pytest.raises(ValueError, match=r"A\[n,n-1\] != 0, and it is 0 at n = \[1, 2\]"):
        rollout(mixture(), noise(), leaf, memory=reversible)


@pytest.mark.parametrize("where", ["keep", "offload", "reversible"])
def test_states_of_any_layout(where):
    denoiser, solver, x = mixture(), nudged(BELMSolver(3, VP)), noise(4)
    wanted = gradients(denoiser, solver, x, None, None, plain_rollout)
    for other in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert same(gradients(denoiser, solver, other, None, MemoryPolicy(1, where)), wanted, 1e-12)


@pytest.mark.parametrize(("where", "steps"), [("keep", 3), ("keep", 1), ("reversible", 1)])
def test_noise_changed_before_any_walk_back_is_refused(where, steps):
    x = noise()
    out = rollout(mixture(), x, BELMSolver(steps, VP).tableau(), memory=MemoryPolicy(1, where)).sum()
    if where == "keep":
        out.backward(retain_graph=True)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.backward()


@pytest.mark.parametrize("where", ["offload", "reversible"])
def test_one_way_back_only(where):
    out = rollout(mixture(), noise(), BELMSolver(3, VP).tableau(), memory=MemoryPolicy(trajectory=where)).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="walked back once"):
        out.backward()


def test_a_carry_of_float64_states_is_refused():
    with pytest.raises(ValueError, match="carry=True holds states in float64, and these are float64 already"):
        rollout(mixture(), noise(), BELMSolver(3, VP).tableau(), memory=BANDS[2])


def test_policy_refuses_nonsense():
    with pytest.raises(ValueError, match="'disk'"):
        MemoryPolicy(trajectory="disk")
    with pytest.raises(ValueError, match="carry=True belongs to"):
        MemoryPolicy(carry=True)


def test_calls_with_split_guidance_and_the_loss_alone():
    calls = []
    inner = mixture(classes=3)
    denoiser = Denoiser(lambda x, t, c: (calls.append(len(x)), inner(x, t, c))[1], VP, "data", SHAPE, classes=3)
    model, cond = guided(denoiser, 2.0, torch.zeros(1, dtype=torch.long)), torch.tensor([1, 2])
    for memory, forward, backward in (
        (MemoryPolicy(1), [4] * 5, [4] * 4),
        (MemoryPolicy(1, split_guidance=True), [2] * 10, [2] * 9),
        (MemoryPolicy(3, split_guidance=True), [2] * 10, [2] * 7),
        (MemoryPolicy(0, split_guidance=True), [2] * 10, []),
        (MemoryPolicy(1, loss_alone=True), [4] * 5, [4] * 5),
        (MemoryPolicy(0, loss_alone=True), [4] * 5, [4] * 5),
    ):
        calls.clear()
        out = rollout(model, noise(), GeneralizedSolver(5, VP).tableau(), cond, memory)
        assert calls == forward
        out.sum().backward()
        assert calls[len(forward) :] == backward


class Wide(nn.Module):
    """Its graph keeps 32 times a state."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(64, 4, generator=generator) / 2, requires_grad=False)
        self.down = nn.Parameter(torch.randn(4, 64, generator=generator) / 8, requires_grad=False)

    def forward(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
        hidden = torch.tanh(torch.einsum("hc,bcp->bhp", self.up, x) * (1 + t.to(x.dtype)))
        return torch.einsum("ch,bhp->bcp", self.down, torch.tanh(hidden))


def kept_and_peak(solver, memory, shape=(4, 65536), cond=None, model=None):
    denoiser = model or Denoiser(Wide(), VP, "data", shape)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    tableau = solver.tableau()
    gc.collect()
    with ByteTracker() as bytes:
        out = rollout(denoiser, x, tableau, cond, memory)
        kept = bytes.live
        out.sum().backward()
    return kept / x.nbytes, bytes.peak / x.nbytes, bytes


def test_states_held_by_each_trajectory():
    """In states: K, the result alone, and two with a byte an element for each step but the first."""
    solver = BELMSolver(20, VP)
    alone = {"loss_alone": True}
    kept, peak, _ = kept_and_peak(solver, MemoryPolicy(1, **alone))
    assert kept == pytest.approx(20, abs=0.1)
    away, low, bytes = kept_and_peak(solver, MemoryPolicy(1, "offload", **alone))
    assert away == pytest.approx(1, abs=0.1) and low < peak - 14
    assert bytes.by_phase["states"] < 6 * 2**20
    two, small, _ = kept_and_peak(solver, MemoryPolicy(1, "reversible", **alone))
    assert two == pytest.approx(2 + 19 / 4, abs=0.2) and small < peak - 10
    carried, _, _ = kept_and_peak(solver, MemoryPolicy(1, "reversible", carry=True, **alone))
    assert carried == pytest.approx(5, abs=0.1)  # the result, and two states of twice the width


def test_host_buffers_are_used_again():
    for _ in range(3):
        kept_and_peak(BELMSolver(6, VP), MemoryPolicy(1, "offload"))
    first = sum(map(len, offload._POOL.free.values()))
    kept_and_peak(BELMSolver(6, VP), MemoryPolicy(1, "offload"))
    assert sum(map(len, offload._POOL.free.values())) == first
    # A rollout that is never walked back gives its buffers back too.
    rollout(mixture(), noise(), nudged(BELMSolver(4, VP)).tableau(), memory=MemoryPolicy(trajectory="offload"))
    gc.collect()
    assert all(isinstance(b, Tensor) for buffers in offload._POOL.free.values() for b in buffers)


def test_split_guidance_halves_the_graph():
    model = guided(Denoiser(Wide(), VP, "data", (4, 65536), classes=3), 3.0, torch.zeros(1, dtype=torch.long))
    cond, solver = torch.tensor([1]), GeneralizedSolver(4, VP)
    _, whole, _ = kept_and_peak(solver, MemoryPolicy(1), cond=cond, model=model)
    _, split, _ = kept_and_peak(solver, MemoryPolicy(1, split_guidance=True), cond=cond, model=model)
    assert split < 0.62 * whole, (split, whole)


def iteration(denoiser, solver, x, target, cond, memory, size, loss=lambda a, b: (a - b).abs().flatten(1).mean(1)):
    solver.zero_grad()
    losses = loss_backward(
        denoiser, x, solver.tableau(denoiser.prediction), lambda y, rows: loss(y, target[rows]), cond, memory, size
    )
    return [losses, *(p.grad.clone() for p in solver.parameters() if p.numel())]


@pytest.mark.parametrize("memory", [MemoryPolicy(), MemoryPolicy(2, "offload", loss_alone=True), BANDS[0]])
def test_micro_batches_are_exact(memory):
    denoiser, x, cond = mixture(classes=5), noise(7), torch.arange(7) % 5
    target, solver = torch.zeros_like(x), nudged(BELMSolver(4, VP))
    solver.zero_grad()
    out = plain_rollout(denoiser, x, solver.tableau(), cond)
    losses = (out - target).abs().flatten(1).mean(1)
    losses.mean().backward()
    wanted = [losses, *(p.grad.clone() for p in solver.parameters())]
    for size in (None, 1, 2, 3, 7, 100):
        assert same(iteration(denoiser, solver, x, target, cond, memory, size), wanted, 1e-12)


def test_micro_batches_and_the_loss_cost_no_more_than_they_must():
    """A micro-batch of 1 peaks at a quarter of a batch of 4; the loss's graph never lives beside a network's."""
    denoiser, solver = Denoiser(Wide(), VP, "data", (4, 65536)), GeneralizedSolver(4, VP)
    x = torch.randn(4, 4, 65536)

    def large(y: Tensor, target: Tensor) -> Tensor:
        return torch.stack([(y * k).tanh() - target for k in range(1, 33)]).square().mean((0, 2, 3))

    def peak(memory: MemoryPolicy, size: int | None, loss=large) -> float:
        with ByteTracker() as bytes:
            iteration(denoiser, solver, x, torch.zeros_like(x), None, memory, size, loss)
        return bytes.peak / x.nbytes

    assert peak(MemoryPolicy(), 1) < 0.3 * peak(MemoryPolicy(), None)
    together, alone = peak(MemoryPolicy(), None), peak(MemoryPolicy(loss_alone=True), None)
    cheap = peak(MemoryPolicy(loss_alone=True), None, lambda y, target: (y - target).square().mean((1, 2)))
    with ByteTracker() as bytes:
        large(x.clone().requires_grad_(), x).sum().backward()
    states = 5 + 2
    assert together > alone + 30 and alone < max(bytes.peak / x.nbytes + states, cheap), (together, alone, cheap)


def test_conditions_of_one_belong_to_all():
    """A condition and a null of one sample, with guidance, joint or split, and micro-batches."""
    denoiser, x, one = mixture(classes=5), noise(4), torch.tensor([3])
    model, solver = guided(denoiser, 2.0, torch.tensor([1])), nudged(GeneralizedSolver(3, VP))
    wanted = iteration(model, solver, x, x, one.expand(4), None, None)
    for memory in (MemoryPolicy(), MemoryPolicy(split_guidance=True)):
        for size in (None, 1, 3):
            assert same(iteration(model, solver, x, x, one, memory, size), wanted, 1e-12)


def test_micro_batch_refuses_nonsense():
    with pytest.raises(ValueError, match="at least 1, got 2 and 0"):
        iteration(mixture(), BELMSolver(2, VP), noise(), noise(), None, None, 0)
    with pytest.raises(ValueError, match="at least 1, got 0 and None"):
        iteration(mixture(), BELMSolver(2, VP), noise(0), noise(0), None, None, None)
    with pytest.raises(ValueError, match=r"a condition of shape \[3\] beside a batch of 2"):
        iteration(mixture(), BELMSolver(2, VP), noise(), noise(), torch.zeros(3), None, 1)


def test_guidance_is_the_weighted_sum_of_two_calls():
    denoiser, x, cond, t = mixture(classes=5), noise(2), torch.tensor([1, 3]), torch.tensor(0.4, dtype=torch.float64)
    got = guided(denoiser, 2.5, torch.tensor([0]))(x, t, cond)
    wanted = 2.5 * denoiser(x, t, cond) - 1.5 * denoiser(x, t, torch.tensor([0, 0]))
    assert relative(got, wanted) < 1e-14
    assert guided(denoiser, 1.0, None) is denoiser
    refused = r"shape \[3\], but beside a condition of \[2\] it must be \[1\]"
    for null, words in ((None, "NoneType beside Tensor"), (torch.zeros(3), refused)):
        with pytest.raises(ValueError, match=words):
            guided(denoiser, 2.0, null)(x, t, cond)
