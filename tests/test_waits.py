"""No host synchronisation inside an iteration: nothing reads a number that the device has still to compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toy import SHAPE, make_perceptron

from gas_engine import Denoiser, GeneralizedSolver, MemoryPolicy, Schedule
from gas_engine.architectures import architecture
from gas_engine.execution import Execution
from gas_engine.gradients import loss_backward
from gas_engine.guidance import guided
from gas_engine.memory import cast

STEPS = 4


class Waits(TorchDispatchMode):
    """Counts copies from the device to the host, the device being "meta", of which no number can be read."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            self.count += 1
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        assert not (func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta)
        return func(*args, **kwargs)


@pytest.mark.parametrize("way", ["lean, blocks", "guided", "split", "fp16", "discrete"])
def test_nothing_waits_inside_an_iteration(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a number raises; one copy for each micro-batch brings the gradient of the tableau."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)  # which meta has none of
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda *device: torch.bfloat16)
    schedule = Schedule.vp_discrete(torch.linspace(0.9999, 0.01, 1000)) if way == "discrete" else Schedule.flow()
    execution = Execution(lean=way == "lean, blocks", blocks="auto" if "blocks" in way else "none")
    if way in ("lean, blocks", "fp16"):
        denoiser: Denoiser = architecture("cifar10").denoiser(small=True)
    else:
        base = make_perceptron().requires_grad_(False)
        network = base.function

        class Timed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = network

            def forward(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
                return self.network(x, schedule(t)[1])

        denoiser = Denoiser(Timed(), schedule, "data", SHAPE)
    if way == "fp16":
        denoiser = cast(denoiser, torch.float16)
    denoiser = denoiser.to("meta")
    cond = torch.zeros(4, 1, device="meta") if way in ("guided", "split") else None
    if cond is not None:
        denoiser = guided(denoiser, 2.0, torch.zeros(1, 1, device="meta"))
    solver = GeneralizedSolver(STEPS, denoiser.schedule, start="quadratic")
    tableau, x = solver.tableau("data"), torch.empty(4, *denoiser.shape, device="meta")
    memory = MemoryPolicy(1, split_guidance=way == "split")
    with Waits() as waits:
        loss_backward(execution.view(denoiser), x, tableau, lambda y, rows: y.abs().flatten(1).mean(1), cond, memory, 2)
    assert waits.count == 2
    assert all(p.grad is not None for p in solver.parameters())
