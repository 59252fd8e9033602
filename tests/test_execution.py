"""How the frozen network runs: in half precision, channels last, compiled, captured."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from toy import SHAPE, make_perceptron
from twin import relative

from gas_engine import Denoiser, EDMDenoiser, GeneralizedSolver, MemoryPolicy, Schedule, rollout, speed
from gas_engine.architectures import architecture
from gas_engine.execution import Execution
from gas_engine.gradients import loss_backward
from gas_engine.guidance import guided
from gas_engine.memory import ByteTracker, cast
from gas_engine.memory.precision import core
from gas_engine.planner import plan
from gas_engine.speed import captured, compiled
from gas_engine.training import setup
from gas_engine.training.opening import MEMORY, RESUMABLE
from gas_engine.training.options import Config

STEPS = 4


def iteration(denoiser: Denoiser, steps: int = STEPS, kept: int = 1, factor: float = 1.0, **options) -> list[Tensor]:
    """Losses, and the gradients of every parameter of a solver."""
    torch.manual_seed(1)
    x = torch.randn(3, *denoiser.shape)
    solver = GeneralizedSolver(steps, denoiser.schedule, start="quadratic")

    def loss(y: Tensor, rows: slice) -> Tensor:
        assert y.dtype == torch.float32
        return factor * y.abs().flatten(1).mean(1)

    memory = MemoryPolicy(kept)
    losses = loss_backward(denoiser, x, solver.tableau(denoiser.prediction), loss, None, memory, **options)
    return [losses, *(p.grad for p in solver.parameters())]


# Relative L2 of losses and of the solver's gradients; one in bfloat16 has 8 bits, one in float16 11.
TOLERANCES = {"bf16": (3e-3, 5e-2), "fp16": (5e-4, 8e-3)}


@pytest.mark.parametrize("precision", TOLERANCES)
def test_precision(tiny, precision: str) -> None:
    denoiser = tiny()
    before = {name: p.clone() for name, p in denoiser.state_dict().items()}
    half = Execution(precision=precision).place(denoiser, "cpu")
    (losses, *grads), (wanted, *wanted_grads) = iteration(half), iteration(denoiser)
    first, second = TOLERANCES[precision]
    assert relative(losses, wanted) < first
    for got, want in zip(grads, wanted_grads, strict=True):  # theta, xi (through the time label) and phi
        assert got.dtype == want.dtype and want.abs().sum() > 0
        assert relative(got, want) < second
    assert all(
        torch.equal(p, before[name]) and p.dtype == before[name].dtype for name, p in denoiser.named_parameters()
    )
    small, large = (sum(p.nbytes for p in core(d).parameters()) for d in (half, denoiser))
    embedding = sum(p.nbytes for n, p in core(denoiser).named_parameters() if n.startswith("map_"))
    assert small == (large + embedding) // 2


@pytest.mark.parametrize("lean", [False, True])
def test_a_graph_of_half_the_bytes(tiny, lean: bool) -> None:
    denoiser, kept = tiny(), {}
    for precision in ("fp32", "bf16"):
        view = Execution(precision=precision, lean=lean).view(Execution(precision=precision).place(denoiser, "cpu"))
        x = torch.randn(4, *denoiser.shape, requires_grad=True)
        with ByteTracker() as bytes:
            y = view(x, torch.tensor(0.5, dtype=torch.float64))
        kept[precision] = bytes.live - y.nbytes
    assert kept["bf16"] < 0.56 * kept["fp32"], kept


def test_labels_keep_their_digits(tiny) -> None:
    """The state is narrow in the network, its time is not; scalings around it are of the state's own dtype."""
    seen: dict[str, Tensor] = {}
    half = cast(tiny(), torch.bfloat16)
    unet = core(half)
    assert type(unet).__name__ == "SongUNet"
    unet.map_noise.register_forward_pre_hook(lambda m, args: seen.update(label=args[0]))
    next(iter(unet.enc.values())).register_forward_pre_hook(lambda m, args: seen.update(image=args[0]))
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    y = half(torch.randn(2, *half.shape), t)
    assert seen["image"].dtype == torch.bfloat16 and seen["label"].dtype == torch.float32 and y.dtype == torch.float32
    assert {p.dtype for p in unet.map_layer0.parameters()} == {torch.float32}
    assert torch.autograd.grad(y.sum(), t)[0].dtype == torch.float64


def test_small_cotangents_survive_float16(tiny) -> None:
    """A loss of a 2^40th has a gradient of a 2^40th, to the bit: scaled into float16's range, and back."""
    for denoiser, auto in ((cast(tiny(), torch.float16), False), (tiny(), True)):
        with torch.autocast("cpu", torch.float16, enabled=auto):
            plain, small = iteration(denoiser), iteration(denoiser, factor=2.0**-40)
        assert all(torch.equal(a * 2.0**-40, b) and b.abs().sum() > 0 for a, b in zip(plain, small, strict=True))
    zero = iteration(cast(tiny(), torch.float16), factor=0.0)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in zero)


def test_shared_weights_stay_one() -> None:
    network = make_perceptron().function
    network.layers[1].up.weight = network.layers[0].up.weight
    half = cast(network.requires_grad_(False), torch.bfloat16)
    assert half.layers[1].up.weight is half.layers[0].up.weight
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_channels_last(tiny, precision: str) -> None:
    plain = Execution(precision=precision).place(tiny(), "cpu")
    last = Execution(precision=precision, channels_last=True).place(tiny(), "cpu")
    weights = [p for p in core(last).parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert weights and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    assert last(torch.randn(2, *last.shape), torch.tensor(0.5, dtype=torch.float64)).is_contiguous()
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    assert all(relative(a, b) < tolerance for a, b in zip(iteration(last), iteration(plain), strict=True))


def test_other_views_go_with_them() -> None:
    """Blocks, guidance, eight bits and streams see the cast network."""
    denoiser = make_perceptron().requires_grad_(False)
    half = cast(denoiser, torch.bfloat16)
    wanted = iteration(half)
    execution = Execution(lean=True, blocks="auto", precision="bf16")
    for way in (execution, Execution(weights="streamed", precision="bf16")):
        got = iteration(way.view(way.place(denoiser, "cpu")))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    cond = torch.zeros(3, 1)
    both = guided(half, 3.0, torch.zeros(1, 1))
    x, t = torch.randn(3, *SHAPE), torch.tensor(0.5, dtype=torch.float64)
    torch.testing.assert_close(both(x, t, cond), half(x, t), rtol=2e-2, atol=2e-2)
    assert core(both) is core(half)


def counted() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def small_edm() -> EDMDenoiser:
    """With an output that is not all but zero, as that of a network that was never trained is."""
    torch.manual_seed(0)
    denoiser = architecture("cifar10").denoiser(small=True)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(0.02 * torch.randn_like(p))
    assert isinstance(denoiser, EDMDenoiser)
    return denoiser


@pytest.mark.parametrize("options", [{}, {"backend": "aot_eager"}], ids=["perceptron", "edm"])
def test_compiled(compiler, tiny, options) -> None:
    """One code for the forward pass and what is rebuilt, and for every number of steps."""
    denoiser = tiny() if options else make_perceptron().requires_grad_(False)
    fast = compiled(denoiser, **options)
    kept, rebuilt = iteration(fast, kept=0), iteration(fast, kept=1)
    assert all(torch.equal(a, b) for a, b in zip(kept, rebuilt, strict=True))
    assert counted() == 1
    assert all(relative(a, b) < 1e-4 for a, b in zip(kept, iteration(denoiser), strict=True))
    iteration(fast, steps=10)
    tableau = GeneralizedSolver(STEPS, denoiser.schedule, start="quadratic").tableau(denoiser.prediction)
    x = torch.randn(3, *denoiser.shape)
    with torch.no_grad():
        sampled = rollout(fast, x, tableau)
    assert torch.equal(sampled, rollout(fast, x, tableau).detach()) and not sampled.requires_grad
    assert counted() == 1


def test_execution_compiles(compiler) -> None:
    view = Execution(compile=True, precision="bf16").view(cast(small_edm(), torch.bfloat16))
    assert isinstance(view, Denoiser) and counted() == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16, got 'fp8'"),
        ({"compile": True, "blocks": "auto"}, "compile makes one piece of a network's call, and blocks='auto'"),
        ({"cuda_graphs": True, "weights": "streamed"}, "cuda_graphs makes one piece .* streamed weights"),
        ({"compile": True, "lean": True}, "lean chooses another; leave out one"),
        ({"compile": True, "cuda_graphs": True}, "cuda_graphs replays another; leave out one"),
        ({"cuda_graphs": True, "memory": MemoryPolicy(0)}, "checkpoint_every must be 1, got 0"),
    ],
)
def test_refusals(options, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Execution(**options)


def test_refusals_of_a_place(tiny) -> None:
    with pytest.raises(ValueError, match="cuda_graphs needs a CUDA device, got cpu"):
        Execution(cuda_graphs=True).place(tiny(), "cpu")
    with pytest.raises(ValueError, match="need all of the network's inputs on a CUDA device, got one on cpu"):
        captured(tiny())(torch.randn(1, *tiny().shape), torch.tensor(0.5, dtype=torch.float64))
    network = nn.Linear(4, 4).requires_grad_(False)
    hidden = Denoiser(lambda x, t, cond: network(x), Schedule.flow(), "flow", (4,))
    with pytest.raises(ValueError, match="closes over its network"):
        Execution(precision="bf16").place(hidden, "cpu")
    for option in ("compile", "cuda_graphs"):
        with pytest.raises(ValueError, match="counts the bytes of the network as it is"):
            setup.execution(Config(memory_budget="1GiB", **{option: True}))
        with pytest.raises(ValueError, match="--shard fetches weights between the pieces of a call"):
            setup.check_shard(Config(shard=True, **{option: True}), SimpleNamespace(size=2))
    with pytest.raises(ValueError, match="counts the bytes of the network as it is"):
        plan(tiny(), 2, 1, "1GiB", like=Execution(compile=True))


def test_options_reach_the_run() -> None:
    config = Config(precision="bf16", channels_last=True, compile=True)
    assert setup.execution(config) == Execution(precision="bf16", channels_last=True, compile=True)
    assert str(setup.execution(config)).endswith("bf16, channels last, compile")
    # A resumed run goes on in its precision and with its code.
    assert not {"precision", "compile"} & {*MEMORY, *RESUMABLE}
    ways = [*Execution(cuda_graphs=True).cheaper(make_perceptron(), 2)]
    assert not any(way.cuda_graphs for way in ways) and [way.blocks for way in ways[-2:]] == ["auto", "nested"]
    assert not [*Execution(compile=True).cheaper(make_perceptron(), 2)][-1].compile


def test_plans_know_the_precision() -> None:
    """Bytes of a half-precision iteration, as the tracker counts them; the choice runs in that precision."""
    denoiser = architecture("cifar10").denoiser(small=True)
    like = Execution(precision="bf16", channels_last=True)
    found = plan(denoiser, STEPS, 3, "1GiB", like=like, blocks=("none",))
    chosen = next(p for p in found if p.memory == MemoryPolicy(1))
    assert chosen.execution.precision == "bf16" and chosen.execution.channels_last
    assert chosen.weight_bytes < 0.6 * sum(p.nbytes for p in denoiser.parameters())
    view = chosen.execution.view(Execution(precision="bf16").place(denoiser, "cpu"))
    with ByteTracker() as bytes:
        iteration(view)
    inputs = 3 * 4 * denoiser.shape[0] * denoiser.shape[1] * denoiser.shape[2]
    assert chosen.peaks.largest == pytest.approx(bytes.peak - inputs, rel=0.05)


def one_memory(function, samples, allow_unused_input):
    """What ``torch.cuda.make_graphed_callables`` promises: each replay writes over the results of the one before."""
    static = [t.detach().clone().requires_grad_(t.requires_grad) for t in samples]
    held: dict[str, Tensor] = {}

    def place(name: str, value: Tensor) -> Tensor:
        held[name] = held[name].copy_(value) if name in held else value.detach().clone()
        return held[name].detach()

    class Graphed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            with torch.no_grad():
                for s, t in zip(static, inputs, strict=True):
                    s.copy_(t)
            with torch.enable_grad():
                held_graph[0] = function(*static)
            return place("output", held_graph[0])

        @staticmethod
        def backward(ctx, g):
            wanted = [t for t in static if t.requires_grad]
            found = torch.autograd.grad(held_graph[0], wanted, g, retain_graph=True, allow_unused=allow_unused_input)
            grads = iter([None if v is None else place(f"gradient {i}", v) for i, v in enumerate(found)])
            return tuple(next(grads) if t.requires_grad else None for t in static)

    held_graph: list = [None]
    made.append(samples)
    return Graphed.apply


made: list = []


@pytest.mark.parametrize("model", [make_perceptron, small_edm])
def test_captured_calls_keep_what_outlives_a_replay(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for CUDA graphs: one pair of graphs for each size of micro-batch, and the same bits."""
    monkeypatch.setattr(speed, "GRAPHS_ON", "cpu")
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", one_memory)
    made.clear()
    denoiser = model().requires_grad_(False)
    graphs = captured(denoiser)
    for _ in range(2):
        got, wanted = (iteration(d, micro_batch=2) for d in (graphs, denoiser))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert [len(samples[0]) for samples in made] == [2, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run bench/gpu.sh on one")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("way", ["cuda_graphs", "compile", "channels_last"])
def test_on_a_device(compiler, way: str, precision: str) -> None:
    """The values and gradients of the plain calls; micro-batches of two sizes."""

    def on_device(execution: Execution, rounds: int = 1) -> list[list[Tensor]]:
        denoiser = execution.view(execution.place(small_edm(), "cuda"))
        torch.manual_seed(1)
        x, found = torch.randn(3, *denoiser.shape).cuda(), []
        for _ in range(rounds):
            solver = GeneralizedSolver(STEPS, denoiser.schedule, start="quadratic")
            losses = loss_backward(
                denoiser, x, solver.tableau("data"), lambda y, rows: y.abs().flatten(1).mean(1), None,
                execution.memory, 2,
            )  # fmt: skip
            found.append([losses.cpu(), *(p.grad for p in solver.parameters())])
        return found

    (wanted,) = on_device(Execution(precision=precision))
    for got in on_device(Execution(precision=precision, **{way: True}), rounds=2):
        tolerance = 1e-4 if precision == "fp32" else 5e-2
        assert all(relative(a, b) < tolerance for a, b in zip(got, wanted, strict=True))
