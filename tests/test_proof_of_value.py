"""On networks of the published architectures, small: nothing that saves memory changes a loss or a gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from twin import plain_rollout, relative

from gas_engine import BELMSolver, GeneralizedSolver, MemoryPolicy, guided
from gas_engine.architectures import ARCHITECTURES, architecture
from gas_engine.execution import Execution
from gas_engine.gradients import loss_backward
from gas_engine.memory import ByteTracker, checkpoint_blocks, lean

STEPS, BATCH = 3, 2
EDM = ("cifar10", "ffhq64", "adm64")


def case(name, dtype):
    """A denoiser with guidance where the model is used with it, noise, target, condition, solver."""
    if name not in EDM:
        pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
    torch.manual_seed(0)
    entry = architecture(name)
    denoiser = entry.denoiser(small=True)
    with torch.no_grad():
        for p in denoiser.parameters():  # zero-initialised layers would hide what is behind them
            p.add_(0.02 * torch.randn_like(p))
    denoiser = denoiser.to(dtype)
    x, target = (torch.randn(BATCH, *denoiser.shape, dtype=dtype) for _ in range(2))
    cond, null = entry.cond(BATCH, small=True), entry.null_cond(1, small=True)
    if isinstance(cond, dict):
        cond, null = ({k: v.to(dtype) for k, v in c.items()} if c is not None else None for c in (cond, null))
    solver = GeneralizedSolver(STEPS, denoiser.schedule, start="quadratic")
    wrap = (lambda d: guided(d, 3.0, null)) if entry.guided else (lambda d: d)
    return denoiser, wrap, x, target, cond, solver


def iteration(denoiser, x, target, cond, solver, memory=None, micro_batch=None):
    """(losses, gradients, peak bytes, rows that the network saw) of one training iteration."""
    solver.zero_grad()
    rows, tableau = [], solver.tableau(denoiser.prediction)  # what solvers make once and keep is not counted
    base = denoiser.base
    handle = base.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    with ByteTracker() as bytes:
        losses = loss_backward(
            denoiser, x, tableau,
            lambda y, part: (y - target[part]).square().flatten(1).mean(1), cond, memory, micro_batch,
        )  # fmt: skip
    handle.remove()
    return losses, [p.grad.clone() for p in solver.parameters()], bytes.peak, rows


def of_plain_autograd(denoiser, x, target, cond, solver):
    """(losses, gradients) of the same by the twin of the rollout, whose graph keeps everything."""
    solver.zero_grad()
    out = plain_rollout(denoiser, x, solver.tableau(denoiser.prediction), cond)
    losses = (out - target).square().flatten(1).mean(1)
    losses.mean().backward()
    return losses, [p.grad.clone() for p in solver.parameters()]


def flat(grads):
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_everything_at_once_equals_plain_autograd_of_the_stock_network(name):
    """float64, 1e-9: lean, blocks, one graph, split guidance, offload, the loss alone, micro-batches, together."""
    denoiser, wrap, x, target, cond, solver = case(name, torch.float64)
    wanted, grads = of_plain_autograd(wrap(denoiser), x, target, cond, solver)
    small = wrap(checkpoint_blocks(lean(denoiser)))
    split = MemoryPolicy(1, "offload", split_guidance=True, loss_alone=True)
    for memory, size in ((MemoryPolicy(1), None), (split, 1)):
        losses, got, _, _ = iteration(small, x, target, cond, solver, memory, size)
        assert relative(losses, wanted) < 1e-9
        assert relative(flat(got), flat(grads)) < 1e-9
        assert all(float(g.norm()) > 0 for g in got)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_reversible_walk_equals_plain_autograd_of_the_stock_network(name):
    """float64, 1e-12, gradients of a flow 1e-10: two states and codes, lean, with guidance."""
    denoiser, wrap, x, target, cond, _ = case(name, torch.float64)
    solver = BELMSolver(STEPS, denoiser.schedule, start="quadratic")
    wanted, grads = of_plain_autograd(wrap(denoiser), x, target, cond, solver)
    memory = MemoryPolicy(trajectory="reversible")
    losses, got, _, _ = iteration(wrap(lean(denoiser)), x, target, cond, solver, memory)
    assert relative(losses, wanted) < 1e-12
    # Coefficients are folded by 1 / alpha, which is 1e6 where a flow starts.
    assert relative(flat(got), flat(grads)) < (1e-10 if denoiser.prediction == "flow" else 1e-12)
    assert all(float(g.norm()) > 0 for g in got)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_walk_carried_in_float64_equals_the_one_with_codes(name):
    """float32: an input may differ by a unit in its last place where it is next to zero, and nowhere else."""
    denoiser, wrap, x, target, cond, _ = case(name, torch.float32)
    solver, thin = BELMSolver(STEPS, denoiser.schedule, start="quadratic"), lean(denoiser)
    wanted, grads, _, _ = iteration(wrap(thin), x, target, cond, solver, MemoryPolicy(trajectory="reversible"))
    carry = MemoryPolicy(trajectory="reversible", carry=True)
    losses, got, _, _ = iteration(wrap(thin), x, target, cond, solver, carry)
    assert relative(losses, wanted) < 1e-6
    assert relative(flat(got), flat(grads)) < 1e-6


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_only_rebuilds_agrees_bit_for_bit(name):
    """float32: one graph, two or all, blocks, nested or not, the loss alone; the bytes fall at every step."""
    denoiser, wrap, x, target, cond, solver = case(name, torch.float32)
    thin = lean(denoiser)
    runs = {
        "all": iteration(wrap(thin), x, target, cond, solver, MemoryPolicy(0)),
        "one": iteration(wrap(thin), x, target, cond, solver, MemoryPolicy(1)),
        "blocks": iteration(wrap(checkpoint_blocks(thin)), x, target, cond, solver, MemoryPolicy(1)),
        "nested": iteration(wrap(checkpoint_blocks(thin, "nested")), x, target, cond, solver, MemoryPolicy(1)),
        "alone": iteration(
            wrap(checkpoint_blocks(thin, "all")), x, target, cond, solver, MemoryPolicy(loss_alone=True)
        ),
        "two": iteration(wrap(thin), x, target, cond, solver, MemoryPolicy(2)),
    }
    losses, grads, most, _ = runs["all"]
    for other_losses, other_grads, _, _ in runs.values():
        assert torch.equal(other_losses, losses)
        assert all(torch.equal(a, b) for a, b in zip(other_grads, grads, strict=True))
    stock = iteration(wrap(denoiser), x, target, cond, solver, MemoryPolicy(0))
    peaks = [stock[2], most, runs["one"][2], runs["blocks"][2]]
    assert all(less <= more for more, less in itertools.pairwise(peaks)), peaks
    assert peaks[-1] < 0.6 * peaks[0]
    calls = len(wrap(denoiser).terms(cond)) * BATCH
    # Nested blocks run twice more, and the network around them once more like any other.
    again = 2 * STEPS - 1
    assert [len(runs[k][3]) for k in runs] == [STEPS, again, again, again, 2 * STEPS, again - 1]
    assert all(rows == calls for *_, seen in runs.values() for rows in seen)


def peak(denoiser, steps, execution):
    """Bytes of an iteration of one image; the network's tensors are fake, the solver's numbers real."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(1, *denoiser.shape)
    tableau = GeneralizedSolver(steps, denoiser.schedule).tableau(denoiser.prediction)
    with ByteTracker() as bytes:
        loss_backward(
            execution.view(denoiser), x, tableau, lambda y, rows: y.abs().flatten(1).mean(1), None, execution.memory
        )
    return bytes.peak, x.numel() * 4


def test_peak_of_an_iteration_of_the_cifar10_network():
    """Full size, K = 10, against all graphs of stock layers, 1116.3 MiB: a 30th with one graph, a 60th with blocks;
    and K = 8 holds no more than K = 4 but its states."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        denoiser = architecture("cifar10").denoiser()
    stock = 1116.3 * 2**20
    thin, _ = peak(denoiser, 10, Execution(lean=True))
    blocks, _ = peak(denoiser, 10, Execution(lean=True, blocks="auto"))
    assert stock / thin >= 30 and stock / blocks >= 60, (stock / thin, stock / blocks)
    (few, state), (many, _) = peak(denoiser, 4, Execution(lean=True)), peak(denoiser, 8, Execution(lean=True))
    assert many - 4 * state <= 1.001 * few
