"""The memory engine where it belongs: streams, page-locked buffers, and the allocator's own count."""

from __future__ import annotations

import gc

import pytest
import torch
from twin import relative

from gas_engine import BELMSolver, Denoiser, GeneralizedSolver, MemoryPolicy, Schedule
from gas_engine.architectures import architecture
from gas_engine.execution import Execution
from gas_engine.gradients import loss_backward
from gas_engine.memory import ByteTracker
from gas_engine.planner import LIBRARIES, plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run bench/gpu.sh on one"),
]
STEPS, BATCH = 4, 3


def model(small=True):
    torch.manual_seed(0)
    denoiser = architecture("cifar10").denoiser(small)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return denoiser


def iteration(denoiser, execution, device="cuda", solver=GeneralizedSolver, batch=BATCH):
    torch.manual_seed(1)
    x = torch.randn(batch, *denoiser.shape).to(device)
    student = solver(STEPS, denoiser.schedule, start="quadratic")
    losses = loss_backward(
        execution.view(denoiser), x, student.tableau("data"), lambda y, rows: y.abs().flatten(1).mean(1), None,
        execution.memory, execution.micro_batch,
    )  # fmt: skip
    return [losses.cpu(), *(p.grad for p in student.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "memory", [MemoryPolicy(0), MemoryPolicy(2), MemoryPolicy(loss_alone=True), MemoryPolicy(1, "offload")]
)
def test_policies_agree(memory):
    denoiser = model().cuda()
    wanted = iteration(denoiser, Execution())
    for execution in (Execution(memory), Execution(memory, lean=True, blocks="auto"), Execution(memory, micro_batch=1)):
        got = iteration(denoiser, execution)
        assert all(relative(a, b) < 1e-4 for a, b in zip(got, wanted, strict=True))
    assert all(relative(a, b) < 1e-3 for a, b in zip(iteration(model(), Execution(), "cpu"), wanted, strict=True))


@pytest.mark.parametrize("carry", [False, True])
def test_reversible(carry):
    """Walked back to the bit, or the check of the first state would raise."""
    denoiser = model().cuda()
    wanted = iteration(denoiser, Execution(), solver=BELMSolver)
    got = iteration(denoiser, Execution(MemoryPolicy(1, "reversible", carry=carry)), solver=BELMSolver)
    assert all(relative(a, b) < 1e-3 for a, b in zip(got, wanted, strict=True))


def test_streamed_weights():
    """The same bits as resident ones, with two blocks on the device at most."""
    execution, denoiser = Execution(weights="streamed"), model()
    wanted = iteration(model().cuda(), Execution(blocks="auto"))
    placed = execution.place(denoiser, "cuda")
    for _ in range(3):  # the second pass sends for weights ahead
        assert all(torch.equal(a, b) for a, b in zip(iteration(placed, execution), wanted, strict=True))
    assert all(p.device.type == "cpu" for p in denoiser.parameters())


def test_locked_pages_are_given_back():
    """Built, dropped and built again: no page of the first stays registered, or the copies would bring old weights."""
    execution = Execution(weights="streamed")
    for seed in range(4):
        torch.manual_seed(seed)
        denoiser = architecture("cifar10").denoiser(True)
        wanted = denoiser(torch.ones(1, *denoiser.shape), torch.tensor(0.5, dtype=torch.float64))
        placed = execution.place(denoiser, "cuda")
        got = placed(torch.ones(1, *denoiser.shape, device="cuda"), torch.tensor(0.5, dtype=torch.float64).cuda())
        assert relative(got.cpu(), wanted) < 1e-4
        del denoiser, placed


def test_offload_leaves_the_device():
    shape = (3, 512, 512)

    def twenty(steps, schedule, **options):
        return GeneralizedSolver(20, schedule, **options)

    denoiser = Denoiser(lambda x, t, cond: x * t.to(x.dtype), Schedule.vp_linear(0.1, 20.0), "data", shape)
    state, peaks = 4 * BATCH * 3 * 512 * 512, {}
    for where in ("keep", "offload"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        iteration(
            denoiser, Execution(MemoryPolicy(1, where)), solver=lambda *a, **k: GeneralizedSolver(20, *a[1:], **k)
        )
        peaks[where] = (torch.cuda.max_memory_allocated() - before) / state
    assert peaks["keep"] > 22 and peaks["offload"] < peaks["keep"] - 14, peaks


@pytest.mark.parametrize("execution", [Execution(), Execution(lean=True, blocks="auto"), Execution(MemoryPolicy(2))])
def test_planned_bytes_are_those_of_the_allocator(execution):
    """Between 1.0 and 1.15 of all that the allocator gives out for the full-size network, libraries included."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # those of tests before: they are to be counted here
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    denoiser = model(small=False).cuda()
    plans = plan(denoiser, STEPS, 4, "100GiB", lean=execution.lean, blocks=(execution.blocks,))
    found = next(p for p in plans if p.memory == execution.memory)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        iteration(denoiser, execution, batch=4)
    peak = torch.cuda.max_memory_allocated() - before
    assert 1.0 <= found.bytes / peak <= 1.15, (found.bytes, peak)
    with ByteTracker() as bytes:
        iteration(denoiser, execution, batch=4)
    # Tensors, and what libraries take for a moment.
    assert 0.99 * bytes.peak <= bytes.cuda_peak <= bytes.peak + LIBRARIES, (bytes.peak, bytes.cuda_peak)


def test_attention_runs_by_torchs_own_kernels():
    """In both directions, whatever the device prefers."""
    seen = []

    def network(x, t, cond=None):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        x.register_hook(lambda g: seen.append(torch.backends.cuda.cudnn_sdp_enabled())) if x.requires_grad else None
        return x * t.to(x.dtype)

    denoiser = Denoiser(network, model().schedule, "data", (3, 8, 8))
    iteration(denoiser, Execution())
    assert len(seen) > STEPS and not any(seen)
