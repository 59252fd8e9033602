"""Plans: predicted bytes against those of the real training gradient, choices under a budget, clear words."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gas_engine import Denoiser, GeneralizedSolver, MemoryPolicy, Schedule, load_denoiser
from gas_engine.architectures import ARCHITECTURES, architecture
from gas_engine.costs import Probe
from gas_engine.execution import Execution
from gas_engine.gradients import loss_backward
from gas_engine.guidance import guided
from gas_engine.iteration import Beside, Speed
from gas_engine.memory import ByteTracker
from gas_engine.planner import Plans, plan
from gas_engine.rehearsal import rehearse
from gas_engine.units import parse_bytes, show_bytes

STEPS = 3
# lean, blocks, micro-batch, policy
WAYS = [
    (False, "none", 1, MemoryPolicy(1)),
    (True, "none", 3, MemoryPolicy(2)),
    (True, "auto", 3, MemoryPolicy(0)),
    (True, "all", 1, MemoryPolicy(1, loss_alone=True)),
    (True, "none", 3, MemoryPolicy(1, trajectory="offload")),
    (True, "none", 3, MemoryPolicy(1, split_guidance=True)),
    (True, "auto", 1, MemoryPolicy(3, split_guidance=True)),
    (True, "nested", 3, MemoryPolicy(2)),
    (False, "nested", 1, MemoryPolicy(1, loss_alone=True)),
]


def l1(x: Tensor, rows: slice) -> Tensor:
    return (x - 0.5).abs().flatten(1).mean(1)


def heavy(x: Tensor, rows: slice) -> Tensor:
    """A graph of 64 times its input: what LPIPS is to a small picture."""
    return F.interpolate(x, scale_factor=8.0).square().flatten(1).mean(1)


@functools.cache
def probed(name: str, dtype: torch.dtype | None = None) -> tuple[Denoiser, Probe]:
    if name not in ("cifar10", "ffhq64", "adm64"):
        pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
    torch.manual_seed(0)
    denoiser = architecture(name).denoiser(small=True)
    return denoiser.to(dtype) if dtype else denoiser, Probe(denoiser, architecture(name).cond(1, small=True), dtype)


def both(name, lean, blocks, batch, memory, loss=l1, dtype=None):
    """Predicted and measured peak of an iteration of a micro-batch and one more sample."""
    entry = architecture(name)
    denoiser, probe = probed(name, dtype)

    def guide(network: Denoiser) -> Denoiser:
        return guided(network, 3.0, entry.null_cond(1, small=True)) if entry.guided else network

    solver = GeneralizedSolver(STEPS, entry.schedule, 1e-3)
    peak = probe.loss_cost(loss, batch)[0]
    predicted = rehearse(
        probe, solver.tableau(entry.prediction), batch, memory, lean, blocks, peak, guide
    ).largest  # fmt: skip
    x, cond = torch.randn(batch + 1, *entry.small_shape), entry.cond(batch + 1, small=True)
    network = Execution(lean=lean, blocks=blocks).view(guide(denoiser))
    with ByteTracker() as bytes:
        loss_backward(network, x, solver.tableau(entry.prediction), loss, cond, memory, batch)
    return predicted, bytes.peak


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_predicted_peaks_are_those_of_the_real_iteration(name: str) -> None:
    """Fake tensors at batches 1 and 2 foretell, within 1 %, what real ones of 1 and 3 take, whatever the policy."""
    for lean, blocks, batch, memory in WAYS:
        if memory.split_guidance and not architecture(name).guided:
            continue
        predicted, measured = both(name, lean, blocks, batch, memory)
        assert predicted == pytest.approx(measured, rel=0.01), (lean, blocks, batch, memory)


@pytest.mark.parametrize("alone", [False, True])
def test_a_large_loss(alone: bool) -> None:
    predicted, measured = both("cifar10", True, "auto", 3, MemoryPolicy(1, loss_alone=alone), heavy)
    assert predicted == pytest.approx(measured, rel=0.02)


def test_half_precision() -> None:
    """States stay float32, the network's graph halves."""
    predicted, measured = both("sd3", True, "none", 3, MemoryPolicy(1), dtype=torch.bfloat16)
    assert predicted == pytest.approx(measured, rel=0.02)
    assert predicted < 0.7 * both("sd3", True, "none", 3, MemoryPolicy(1))[0]


def test_work_of_a_call() -> None:
    """DDPM++ at 32 x 32 takes 21.2 G multiplications; its frozen backward pass as much; blocks at most that again."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        denoiser = architecture("cifar10").denoiser()
    probe = Probe(denoiser)
    assert probe.weights == sum(v.nbytes for v in denoiser.state_dict().values())
    plain, blocks = probe.cost(True, "none", 1), probe.cost(True, "all", 1)
    assert plain.forward_flops == blocks.forward_flops == pytest.approx(2 * 21.2e9, rel=0.02)
    assert 0.95 < plain.backward_flops / plain.forward_flops < 1.1
    assert 1.2 < blocks.backward_flops / plain.backward_flops < 2
    assert blocks.kept < 0.5 * plain.kept
    assert probe.cost(True, "none", 5).kept == pytest.approx(5 * plain.kept, rel=0.01)


def test_a_denoiser_with_weights_is_left_as_it_is() -> None:
    denoiser = load_denoiser("digits")
    before = {name: (id(t), t._version) for name, t in denoiser.state_dict(keep_vars=True).items()}
    plans = plan(denoiser, 4, 24, "1GiB")
    assert {name: (id(t), t._version) for name, t in denoiser.state_dict(keep_vars=True).items()} == before
    chosen = plans.choice
    assert (chosen.micro_batch, chosen.memory, chosen.blocks) == (24, MemoryPolicy(0), "none")
    assert chosen.weight_bytes == sum(v.nbytes for v in denoiser.state_dict().values())
    assert chosen.input_bytes == 24 * (2 * 64 * 4 + 8)


def test_a_function_that_closes_over_its_network() -> None:
    network = nn.Sequential(nn.Conv2d(2, 64, 1), nn.SiLU(), nn.Conv2d(64, 2, 1)).requires_grad_(False)
    denoiser = Denoiser(lambda x, t, cond: network(x * t.to(x.dtype)), Schedule.flow(), "flow", (2, 8, 8))
    probe = Probe(denoiser)
    with ByteTracker() as bytes:
        x = torch.zeros(1, 2, 8, 8, requires_grad=True)
        y = denoiser(x, torch.tensor(0.5, dtype=torch.float64, requires_grad=True))
    assert probe.cost(False, "none", 1).kept == pytest.approx(bytes.live - x.nbytes, abs=64) and y.requires_grad
    assert all(type(p) is nn.Parameter for p in network.parameters())


@functools.cache
def plans_of(name: str) -> Plans:
    entry = architecture(name)
    denoiser, probe = probed(name)
    if entry.guided:
        denoiser = guided(denoiser, 3.0, entry.null_cond(1, small=True))
    return plan(denoiser, 4, 6, "1GiB", cond=entry.cond(1, small=True), probe=probe, loss=l1)


@pytest.mark.parametrize("name", ["cifar10", "dit-xl2"])
def test_the_choice_fits_and_runs(name: str) -> None:
    """At every budget: its real iteration stays within it, and a smaller budget never makes a faster plan."""
    if ARCHITECTURES[name].wrapper is not None:
        pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
    entry, plans = architecture(name), plans_of(name)
    denoiser, _ = probed(name)
    if entry.guided:
        denoiser = guided(denoiser, 3.0, entry.null_cond(1, small=True))
    x, cond = torch.randn(6, *entry.small_shape), entry.cond(6, small=True)
    solver = GeneralizedSolver(4, entry.schedule, 1e-3)
    least, most = plans.smallest.bytes, plans.choice.bytes
    assert plans.choice.memory == MemoryPolicy(0) and plans.choice.micro_batch == 6
    passes, seen = plans.choice.passes, set()
    for budget in torch.linspace(least, most, 8).ceil().long().tolist():
        chosen = plans.within(budget + 64).choice
        assert chosen.bytes <= budget + 64
        with ByteTracker() as bytes:
            loss_backward(
                chosen.execution.view(denoiser), x, solver.tableau(entry.prediction), l1, cond, chosen.memory,
                chosen.micro_batch,
            )  # fmt: skip
        room = budget - chosen.weight_bytes - chosen.input_bytes
        assert bytes.peak <= 1.02 * room, chosen
        seen.add((chosen.micro_batch, chosen.blocks, chosen.memory))
    assert len(seen) > 3
    times = [plans.within(budget).choice.passes for budget in range(most, least, (least - most) // 20)]
    assert times == sorted(times) and times[0] == passes


def test_cheaper_ends_at_the_smallest() -> None:
    chosen, bytes = plans_of("cifar10").choice, []
    with pytest.raises(ValueError, match=r"no plan fits into .* the smallest needs .* one sample at a time"):
        while True:
            bytes.append(chosen.bytes)
            chosen = chosen.cheaper()
    assert len(bytes) > 3 and bytes == sorted(bytes, reverse=True)
    assert bytes[-1] < 1.5 * plans_of("cifar10").smallest.bytes


def test_nested_blocks_are_measured_where_nothing_else_fits() -> None:
    """By a smaller budget of the same plans as well."""
    denoiser, probe = probed("cifar10")[0], Probe(probed("cifar10")[0])
    plans = plan(denoiser, STEPS, 2, "1GiB", probe=probe)
    assert not probe.known(True, "nested")
    found = plans.within(plans.smallest.bytes - 1).choice
    assert found.blocks == "nested" and found.bytes < plans.smallest.bytes
    alone = plan(denoiser, STEPS, 2, found.bytes, probe=probe, blocks=("nested",)).choice
    assert (alone.bytes, alone.blocks) == (found.bytes, "nested")


def test_what_runs_beside_hears_how_much_room_there_is() -> None:
    """The budget without the inputs and the smallest of the weights that are allowed; not all parameters."""
    denoiser, probe = probed("cifar10")
    alone = plan(denoiser, 2, 2, 10_000, probe=probe, weights=("resident", "streamed"), blocks=("all",))
    rooms: list[int] = []

    def beside(room: int) -> Beside:
        rooms.append(room)
        return Beside(bytes=77, samples=5)

    found = plan(denoiser, 2, 2, 10_000, probe=probe, weights=("resident", "streamed"), blocks=("all",), beside=beside)
    least = min(p.weight_bytes for p in alone)
    assert rooms == [10_000 - least - alone[0].input_bytes] and {p.weights for p in alone} == {"resident", "streamed"}
    assert least < sum(p.nbytes for p in denoiser.parameters())
    assert min(p.weight_bytes for p in found) == least + 77 and found.iteration.loss_flops == alone.iteration.loss_flops


def test_libraries_take_their_part_of_a_budget() -> None:
    """Bytes are theirs beside the tensors'; on the CPU they hold none unless that is said."""
    denoiser, probe = probed("cifar10")
    plain, beside = (plan(denoiser, STEPS, 1, "1GiB", probe=probe, **more) for more in ({}, {"libraries": 2**20}))
    assert beside.choice.bytes == plain.choice.bytes + 2**20
    least = plain.smallest.bytes
    assert plain.within(least).choice
    with pytest.raises(ValueError, match="no plan fits"):
        assert beside.within(least).choice


def test_a_large_loss_wants_to_be_alone() -> None:
    _, probe = probed("cifar10")
    plans = plan(probed("cifar10")[0], 4, 6, "1GiB", probe=probe, loss=heavy, blocks=("none",))
    alone = [p for p in plans.within(0) if p.memory.loss_alone and p.memory.trajectory == "keep"]
    beside = [p for p in plans.within(0) if p.memory == MemoryPolicy(1)]
    assert alone[0].bytes < beside[0].bytes
    assert plans.within(alone[0].bytes).choice.memory.loss_alone


def test_time_of_an_update() -> None:
    """Without launches, in evaluations: K forward, K - k rebuilt, K backward at their share of the operations."""
    denoiser, probe = probed("cifar10")
    cost = probe.cost(True, "none", 1)
    ratio = cost.backward_flops / cost.forward_flops
    options = {"probe": probe, "speed": Speed(launch=0.0), "evaluation_seconds": 0.5}
    for found in plan(denoiser, 4, 6, "1GiB", blocks=("none",), loss=l1, **options):
        kept = found.memory.kept(4)
        assert found.micro_batch == 6 and found.calls == 4 + 4 - kept
        if found.memory.trajectory == "keep":
            assert found.passes == pytest.approx(4 + (4 - kept) + 4 * ratio, rel=1e-3)
        assert found.seconds == 0.5 * found.passes


class Wide(nn.Module):
    """Four blocks of two layers, 32 x 64 and 64 x 32, between linear layers of 64 x 64."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
        self.layers = nn.ModuleList(Pair() for _ in range(4))

    def forward(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
        h = self.first(x)
        for layer in self.layers:
            h = layer(h)
        return self.last(h)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 32), nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x))


def test_bytes_of_weights() -> None:
    """Of the layers of blocks, scales by row for int8, by 64 numbers for nf4; streamed, three blocks and the rest."""
    denoiser = Denoiser(Wide(), Schedule.flow(), "flow", (64,)).requires_grad_(False)
    kinds = ("resident", "streamed", "int8", "nf4")
    plans = plan(denoiser, 2, 2, "1GiB", weights=kinds, loss=lambda x, rows: x.square().mean(1))
    found = {p.weights: p.weight_bytes for p in plans}
    ends, block = 2 * (64 * 64 + 64), 2 * 64 * 32 + 96
    rows, numbers = 4 * 96, 4 * 2 * 64 * 32
    rest = 4 * (ends + rows + 64 * 32)  # the biases, and one dequantised layer
    assert found["resident"] == 4 * (ends + 4 * block) == 4 * (ends + numbers + rows)
    assert found["streamed"] == 4 * (ends + 3 * block)
    assert found["int8"] == numbers + 4 * rows + rest
    assert found["nf4"] == numbers // 2 + 4 * (numbers // 64) + rest
    assert plans[0].weights == "resident"
    assert all(p.blocks != "none" for p in plans if p.weights == "streamed")
    x = torch.randn(2, 64)
    for way in (next(p for p in plans if p.weights == kind).execution for kind in ("streamed", "nf4")):
        placed, tableau = way.place(denoiser, "cpu"), GeneralizedSolver(2, denoiser.schedule).tableau("flow")
        assert bool(loss_backward(way.view(placed), x, tableau, l1, None, way.memory, way.micro_batch).isfinite().all())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_and_buffers_are_counted(name: str) -> None:
    """What the tracker sees when the network is made is what the planner calls its weights."""
    if ARCHITECTURES[name].wrapper is not None:
        pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
    held = {v.untyped_storage().data_ptr(): v.nbytes for v in probed(name)[0].state_dict(keep_vars=True).values()}
    own = {id(b): b.nbytes for b in probed(name)[0].buffers() if b.untyped_storage().data_ptr() not in held}
    assert probed(name)[1].weights == sum(held.values()) + sum(own.values())


def test_weights_that_cannot_be_moved_are_refused() -> None:
    network = nn.Linear(4, 4).requires_grad_(False)
    closure = Denoiser(lambda x, t, cond: network(x), Schedule.flow(), "flow", (4,))
    with pytest.raises(ValueError, match="closes over its network"):
        plan(closure, 2, 2, "1GiB", weights=("int8",), loss=lambda x, rows: x.mean(1))
    whole = Denoiser(nn.Linear(4, 4).requires_grad_(False), Schedule.flow(), "flow", (4,))
    whole.function.forward = lambda x, t, cond: x * t.to(x.dtype)
    with pytest.raises(ValueError, match="no block was found in custom, so its weights cannot be streamed"):
        plan(whole, 2, 2, "1GiB", weights=("streamed",), loss=lambda x, rows: x.mean(1))


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 * 2**30), ("1.5 gb", 1_500_000_000), ("100MiB", 100 * 2**20), ("7B", 7)]
)
def test_bytes_with_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["0.8", "80%", "8", "GiB", "-1GiB", "0GiB", "8 potatoes", ""])
def test_a_budget_needs_its_unit(text: str) -> None:
    with pytest.raises(ValueError, match="such as 8GiB, got"):
        parse_bytes(text)


def test_clear_words() -> None:
    assert (show_bytes(2**31), show_bytes(2**20)) == ("2.00 GiB", "1.0 MiB")
    denoiser, probe = probed("cifar10")
    with pytest.raises(ValueError, match="steps and batch must be at least 1, got steps=0"):
        plan(denoiser, 0, 1, "1GiB")
    with pytest.raises(ValueError, match="weights must be some of resident, streamed"):
        plan(denoiser, 1, 1, "1GiB", weights=("fp4",), probe=probe)
    with pytest.raises(ValueError, match="blocks must be some of none, auto, all"):
        plan(denoiser, 1, 1, "1GiB", blocks=("some",), probe=probe)
    with pytest.raises(ValueError, match="the tableau has 2 steps, not 3"):
        tableau = GeneralizedSolver(2, denoiser.schedule, 1e-3).tableau("data")
        plan(denoiser, 3, 1, "1GiB", tableau=tableau, probe=probe)
    with pytest.raises(ValueError, match="shape of its states"):
        Probe(Denoiser(lambda x, t, cond: x, Schedule.flow(), "flow", None))
