"""Bytes by storage: against sums by hand, the same for fake tensors, by phase and module."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gas_engine.memory import ByteTracker, phase
from gas_engine.networks import build_edm


def stack() -> nn.Sequential:
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
    return nn.Sequential(*layers).requires_grad_(False)


def test_live_and_peak_by_hand() -> None:
    x = torch.randn(256)  # 1 KiB, there before
    with ByteTracker() as bytes:
        y = x * 2
        assert bytes.live == bytes.peak == 1024
        z = y.view(16, 16).t()  # views are no new bytes
        y.add_(1)  # nor are writes
        assert bytes.live == 1024
        w = torch.cat([y, y])
        assert bytes.live == 3072
        del y
        assert bytes.live == 3072  # z still holds it
        del z, w
        assert bytes.live == 0 and bytes.peak == 3072
        bytes.reset_peak()
        assert bytes.peak == 0
        torch.empty(0)
    assert bytes.peak == 0


def test_views_of_weights_are_not_new_bytes() -> None:
    layer, x = nn.Linear(64, 32, bias=False), torch.randn(4, 64)
    with ByteTracker() as bytes:
        y = x @ layer.weight.t()
    assert bytes.peak == y.nbytes


def test_the_graph_counts_until_it_is_gone() -> None:
    """conv2d keeps its input, SiLU its own: 8 channels at each place; the result has 3."""
    network, x = stack(), torch.randn(2, 3, 16, 16, requires_grad=True)
    with ByteTracker(network) as bytes:
        with phase("network"):
            y = network(x)
        wide, narrow, statistics = 2 * 8 * 256 * 4, 2 * 3 * 256 * 4, 2 * 2 * 4 * 4
        assert bytes.live == 3 * wide + statistics + narrow
        with phase("loss"):
            loss = y.square().sum()
        loss.backward()
        assert x.grad is not None
        del y, loss
        assert bytes.live == x.grad.nbytes
    assert bytes.by_phase["network"] >= 2 * wide
    assert sum(bytes.by_phase.values()) == sum(bytes.by_module.values()) == bytes.peak
    assert {"0", "1"} <= set(bytes.by_module)


@pytest.mark.parametrize("backward", [False, True])
def test_fake_tensors_give_the_same_number(backward: bool) -> None:
    options = {"img_resolution": 16, "img_channels": 3, "model_type": "SongUNet", "model_channels": 32}
    options.update(channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8])

    def measure() -> tuple[int, int]:
        network = build_edm(options).requires_grad_(False)
        x, sigma = torch.randn(2, 3, 16, 16, requires_grad=True), torch.ones(2, dtype=torch.float64)
        with ByteTracker() as bytes:
            y = network(x, sigma)
            if backward:
                y.sum().backward()
        return bytes.live, bytes.peak

    real = measure()
    with FakeTensorMode():
        assert measure() == real


def test_phases_nest_and_end_with_errors() -> None:
    with ByteTracker() as bytes, phase("outer"):
        with pytest.raises(ZeroDivisionError), phase("inner"):
            a = torch.zeros(256)
            raise ZeroDivisionError
        b = F.relu(a)
    assert bytes.by_phase == {"inner": a.nbytes, "outer": b.nbytes}


def test_fixture_counts_the_test(byte_tracker: ByteTracker) -> None:
    keep = torch.zeros(1024)
    with phase("states"):
        more = torch.zeros(256)
    assert byte_tracker.live == byte_tracker.peak == keep.nbytes + more.nbytes
    assert byte_tracker.by_phase == {"other": keep.nbytes, "states": more.nbytes}


def test_host_memory_is_counted_beside_the_device(byte_tracker: ByteTracker) -> None:
    with phase("host"):
        away = torch.zeros(512)
    assert byte_tracker.live == byte_tracker.peak == 0 and byte_tracker.host == away.nbytes
    del away
    assert byte_tracker.host == 0


def test_phases_of_a_training_update() -> None:
    """States, network graph, loss graph and optimiser are told apart; what backward passes allocate belongs to them."""
    from test_training import toy_trainer

    trainer = toy_trainer()
    with ByteTracker() as bytes:
        trainer.update()
        at_peak = dict(bytes.by_phase)
        bytes.reset_peak()
        keep = bytes.by_phase
    state = 4 * 4 * 18
    assert at_peak["network"] > 4 * state and at_peak["states"] > state and at_peak["loss"] > 0
    moments = sum(s[name].nbytes for s in trainer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    assert moments <= keep["optimiser"] < 1.2 * moments
