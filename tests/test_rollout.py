"""The adjoint against plain autograd, finite differences, bytes and network calls."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy import SHAPE, mixture, noise
from twin import plain_rollout, relative

from gas_engine import Denoiser, GeneralizedSolver, MemoryPolicy, Schedule, Tableau, rollout
from gas_engine._attention import without_cudnn
from gas_engine.solvers import grid
from gas_engine.solvers.named import MAKERS, named_solver
from gas_engine.tableau import PREDICTIONS

VP = Schedule.vp_linear(0.1, 20.0)


def perturbed(steps, schedule=VP, seed=0, **options):
    solver = GeneralizedSolver(steps, schedule, 1e-3, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in solver.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return solver


def gradients(run, denoiser, solver, x, cond=None, **options):
    solver.zero_grad()
    x = x.clone().requires_grad_()
    out = run(denoiser, x, solver.tableau(denoiser.prediction), cond, **options)
    (out.sin().sum() + out.square().mean()).backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in solver.parameters() if p.numel())]


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors[1:]])


@pytest.mark.parametrize("steps", range(1, 11))
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_adjoint_equals_autograd(steps, prediction):
    """float64, to 1e-12, for every K, prediction type and policy; and the policies agree bit for bit."""
    schedule = Schedule.flow(2.0) if prediction == "flow" else VP
    denoiser, solver, x = mixture(schedule, prediction), perturbed(steps, schedule), noise()
    wanted = gradients(plain_rollout, denoiser, solver, x)
    first = None
    for every in range(steps + 1):
        got = gradients(rollout, denoiser, solver, x, memory=MemoryPolicy(every))
        # As one vector; alone, a part that cancels from coefficients near 1/alpha(1) = 150 has fewer digits to match.
        assert relative(flat(got), flat(wanted)) < 1e-12 and relative(got[0], wanted[0]) < 1e-12
        assert all(relative(a, b) < 1e-11 for a, b in zip(got, wanted, strict=True))
        first = first or got
        assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True))


@pytest.mark.parametrize("options", [{"order": 2}, {"theory": False}, {"theory": "linear"}, {"start": "quadratic"}])
def test_adjoint_equals_autograd_for_every_form(options):
    denoiser, solver = mixture(), perturbed(5, **options)
    wanted = gradients(plain_rollout, denoiser, solver, noise())
    got = gradients(rollout, denoiser, solver, noise(), memory=MemoryPolicy(2))
    assert all(relative(a, b) < 1e-12 for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_adjoint_equals_autograd_for_every_solver(name):
    """Gradients with respect to every number of a classical tableau."""
    base = named_solver(name, VP, 6, "quadratic").fold("noise")
    denoiser, results = mixture(VP, "noise"), []
    for run in (rollout, plain_rollout):
        leaves = [v.clone().requires_grad_() for v in (base.A, base.B, base.t_net, base.c_in)]
        run(denoiser, noise(), Tableau(*leaves)).cos().sum().backward()
        results.append([leaf.grad.tril() if leaf.grad.ndim == 2 else leaf.grad for leaf in leaves])
    assert all(relative(a, b) < 1e-12 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("every", [0, 1, 3])
def test_adjoint_equals_finite_differences(every):
    solver = perturbed(4)
    base, denoiser = solver.tableau("data"), mixture()

    def run(a, b, t, c, x):
        return rollout(denoiser, x, Tableau(a.tril(), b.tril(), t, c), memory=MemoryPolicy(every))

    inputs = [v.detach().clone().requires_grad_() for v in (base.A, base.B, base.t_net, base.c_in * 1.1)]
    assert torch.autograd.gradcheck(run, [*inputs, noise(1).requires_grad_()], atol=1e-6)


def test_condition_reaches_every_evaluation():
    cond = torch.tensor([1, 3])
    denoiser, solver = mixture(classes=5), perturbed(3)
    wanted = gradients(plain_rollout, denoiser, solver, noise(), cond)
    got = gradients(rollout, denoiser, solver, noise(), cond)
    assert all(relative(a, b) < 1e-12 for a, b in zip(got, wanted, strict=True))
    assert relative(got[0], gradients(rollout, denoiser, solver, noise())[0]) > 1e-4


@pytest.mark.parametrize("every", [0, 1, 2, 5, 9])
def test_network_calls_are_exactly_k_forward_and_k_minus_k_kept_rebuilt(every):
    denoiser, solver = mixture(), perturbed(5)
    out = rollout(denoiser, noise(), solver.tableau(), memory=MemoryPolicy(every))
    assert denoiser.function.calls == 5
    out.sum().backward()
    kept = 5 if every in (0, 9) else every
    assert denoiser.function.calls == 5 + (5 - kept)


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("wanted", [False, True])
def test_constant_noise_takes_no_derivative_through_the_first_evaluation(every, wanted):
    """But by its told time; noise that wants a gradient takes one. The solver's gradient is the same."""
    inner, solver, graphs = mixture(), perturbed(4), {}

    def network(x, t, cond):
        if torch.is_grad_enabled():
            graphs[float(t.detach())] = x.requires_grad, t.requires_grad
        return inner(x, t)

    found = []
    for run, options in ((plain_rollout, {}), (rollout, {"memory": MemoryPolicy(every)})):
        solver.zero_grad()
        graphs.clear()
        x = noise().requires_grad_(wanted)
        run(Denoiser(network, VP, "data", SHAPE), x, solver.tableau(), **options).sin().sum().backward()
        found.append([p.grad.clone() for p in solver.parameters()])
    # Times fall from noise to data.
    assert [graphs[t] for t in sorted(graphs, reverse=True)] == [(wanted, True)] + 3 * [(True, True)]
    assert all(relative(a, b) < 1e-12 for a, b in zip(*found[::-1], strict=True))


class LiveBytes(TorchDispatchMode):
    """Bytes of distinct storages that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._watch(leaf.untyped_storage())
        return out

    def _watch(self, storage):
        key = storage._cdata
        if key in self.seen or storage.nbytes() == 0:
            return
        self.seen.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key, size):
        self.seen.discard(key)
        self.live -= size


class Wide(nn.Module):
    """A frozen network whose graph keeps far more than a state: 16 hidden maps."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(64, 4, generator=generator) / 2, requires_grad=False)
        self.down = nn.Parameter(torch.randn(4, 64, generator=generator) / 8, requires_grad=False)

    def forward(self, x, t, cond=None):
        hidden = torch.tanh(torch.einsum("hc,bcp->bhp", self.up, x) * (1 + t.to(x.dtype)))
        return torch.einsum("ch,bhp->bcp", self.down, torch.tanh(hidden))


def bytes_of(steps, every):
    """(bytes alive between forward and backward, peak of both) of one iteration, without scalars' dust."""
    denoiser = Denoiser(Wide(), VP, "data", (4, 512))
    x = torch.randn(8, 4, 512, generator=torch.Generator().manual_seed(0))
    tableau = GeneralizedSolver(steps, VP).tableau()
    with LiveBytes() as counter:
        out = rollout(denoiser, x, tableau, memory=MemoryPolicy(every))
        kept = counter.live
        out.sum().backward()
    return kept, counter.peak, x.numel() * 4


def test_bytes_kept_do_not_grow_with_k_beyond_the_states():
    kept4, peak4, state = bytes_of(4, 1)
    kept20, peak20, _ = bytes_of(20, 1)
    dust = 64 * 1024  # K^2 scalars
    assert kept20 - kept4 <= 16 * state + dust
    assert peak20 - peak4 <= 2 * 16 * state + dust
    graph = (bytes_of(4, 0)[0] - kept4) / 3
    assert graph > 30 * state, "the network graph must dwarf a state, or this test shows nothing"
    assert kept20 < 21 * state + 1.1 * graph


def test_bytes_kept_grow_by_a_graph_for_every_graph_kept():
    kept = [bytes_of(6, every)[0] for every in (1, 2, 3, 0)]
    step = kept[1] - kept[0]
    assert kept[2] - kept[1] == pytest.approx(step, rel=0.02)
    assert kept[3] - kept[0] == pytest.approx(5 * step, rel=0.02)


def test_sampling_keeps_only_what_later_steps_use():
    denoiser = Denoiser(lambda x, t, cond: x, VP, "data", (1000,))
    tableau = named_solver("dpmpp2m", VP, 40)
    with LiveBytes() as counter:
        rollout(denoiser, torch.zeros(16, 1000), tableau)
    assert counter.peak < 8 * 16 * 1000 * 4


def test_input_scale_is_differentiable_and_applied():
    base = named_solver("dpmpp2m", VP, 4).fold("data")
    results = []
    for run in (rollout, plain_rollout):
        scale = torch.tensor([1.0, 0.9, 1.1, 0.7], dtype=torch.float64, requires_grad=True)
        out = run(mixture(), noise(), Tableau(base.A, base.B, base.t_net, scale))
        out.sum().backward()
        results += [[out, scale.grad]]
    assert all(relative(a, b) < 1e-12 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_policies_agree_bit_for_bit_with_input_scales(dtype):
    base, results = named_solver("dpmpp2m", VP, 4).fold("data"), []
    for every in (0, 1, 2):
        numbers = [v.clone().requires_grad_() for v in (base.A, base.B, base.t_net, 0.9 * base.c_in)]
        x = noise(2, dtype).requires_grad_()
        rollout(mixture(), x, Tableau(*numbers), memory=MemoryPolicy(every)).float().square().sum().backward()
        results.append([x.grad, *(v.grad for v in numbers)])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_keep_their_dtype(dtype):
    out = rollout(mixture(), noise(2, dtype), perturbed(3).tableau())
    assert out.dtype == dtype and bool(torch.isfinite(out).all())


def test_network_in_another_precision():
    """float32 states, a bfloat16 network: its outputs enter at state precision, its gradients come back."""
    inner = mixture()
    half = Denoiser(lambda x, t, c: inner(x.bfloat16(), t), VP, "data", SHAPE)
    solver, x = perturbed(4), noise(4, torch.float32)
    out = rollout(half, x, solver.tableau())
    out.sum().backward()
    assert out.dtype == torch.float32 and relative(out, rollout(inner, x, solver.tableau())) < 0.05
    assert float(solver.theta.grad.abs().sum()) > 0


def test_on_step_sees_every_state():
    seen = []
    out = rollout(mixture(), noise(), perturbed(3).tableau(), on_step=lambda n, x: seen.append((n, x.clone())))
    assert [n for n, _ in seen] == [1, 2, 3] and torch.equal(seen[-1][1], out)


def test_results_do_not_depend_on_the_batch():
    x, tableau = noise(5), perturbed(4).tableau().fold("data")
    whole = rollout(mixture(), x, tableau)
    parts = torch.cat([rollout(mixture(), x[i : i + 1], tableau) for i in range(5)])
    assert relative(parts, whole) < 1e-14


def test_trainable_weights_are_refused():
    denoiser = Denoiser(Wide(), VP, "data", (4, 512))
    denoiser.function.up.requires_grad_(True)
    tableau, x = GeneralizedSolver(2, VP).tableau(), torch.zeros(1, 4, 512)
    with pytest.raises(RuntimeError, match=r"requires_grad_\(False\)"):
        rollout(denoiser, x, tableau)
    with torch.no_grad():
        assert rollout(denoiser, x, tableau).shape == x.shape


def test_trainable_weights_in_a_closure_are_refused_too():
    network = Wide()
    network.up.requires_grad_(True)
    denoiser = Denoiser(lambda x, t, cond: network(x, t), VP, "data", (4, 512))
    with pytest.raises(RuntimeError, match="trainable weights"):
        rollout(denoiser, torch.zeros(1, 4, 512), GeneralizedSolver(2, VP).tableau())


def test_random_networks_are_refused():
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Unflatten(1, SHAPE))
    denoiser = Denoiser(lambda x, t, cond: network(x) * t.to(x.dtype), VP, "data", SHAPE)
    assert not network.training
    network.train()
    with pytest.raises(RuntimeError, match=r"train mode.*eval\(\)"):
        rollout(denoiser, noise(), GeneralizedSolver(2, VP).tableau())


def test_rebuilt_evaluations_repeat_the_autocast_of_the_forward_pass():
    weight = torch.randn(18, 18, generator=torch.Generator().manual_seed(0)) / 4

    def function(x, t, cond):
        return (x.flatten(1) @ weight).view_as(x).float() * t.float()

    denoiser, results = Denoiser(function, VP, "data", SHAPE), []
    for every in (0, 1, 2):
        solver = perturbed(4)
        with torch.autocast("cpu", torch.bfloat16):
            out = rollout(denoiser, noise(3, torch.float32), solver.tableau(), memory=MemoryPolicy(every))
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in solver.parameters())])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_noise_changed_before_backward_is_refused():
    x = noise()
    out = rollout(mixture(), x, perturbed(2).tableau()).sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.backward()


def test_too_many_steps_for_gradients_are_refused_before_any_work():
    denoiser, tableau = mixture(), named_solver("euler", VP, 70).fold("data")
    with pytest.raises(ValueError, match="at most 64 steps, got 70"):
        rollout(denoiser, noise().requires_grad_(), tableau)
    assert denoiser.function.calls == 0 and rollout(denoiser, noise(), tableau).shape == noise().shape


def test_condition_that_wants_a_gradient_is_refused():
    cond = {"text": [torch.zeros(2, requires_grad=True)]}
    with pytest.raises(RuntimeError, match="cond wants a gradient"):
        rollout(mixture(), noise(), GeneralizedSolver(2, VP).tableau(), cond)


def test_second_backward_runs_the_evaluations_again():
    solver, denoiser = perturbed(3), mixture()
    out = rollout(denoiser, noise(), solver.tableau()).sum()
    out.backward(retain_graph=True)
    first, calls = solver.theta.grad.clone(), denoiser.function.calls
    solver.zero_grad()
    out.backward()
    assert torch.equal(solver.theta.grad, first) and denoiser.function.calls == 2 * calls


@pytest.mark.parametrize(
    ("x", "seen"),
    [
        (torch.zeros(2, 3, 3, 3), r"\(2, 3, 3, 3\)"),
        (torch.zeros(2, 3, 3), "needs"),
        (torch.zeros(1, *SHAPE).int(), "int32"),
    ],
)
def test_states_that_do_not_fit_are_refused(x, seen):
    with pytest.raises(ValueError, match=seen):
        rollout(mixture(), x, GeneralizedSolver(2, VP).tableau())


def test_tableau_for_another_prediction_is_refused():
    with pytest.raises(ValueError, match="already folded for a noise network"):
        rollout(mixture(), noise(), GeneralizedSolver(2, VP).tableau("noise"))


@pytest.mark.parametrize("every", [-1, 1.5, None])
def test_policy_refuses_nonsense(every):
    with pytest.raises(ValueError, match=str(every)):
        MemoryPolicy(every)


def test_denoiser_refuses_an_unknown_prediction():
    with pytest.raises(ValueError, match="'score'"):
        Denoiser(lambda x, t, c: x, VP, "score", SHAPE)


def test_grid_times_on_flow_reach_the_data():
    schedule = Schedule.flow()
    out = rollout(mixture(schedule, "flow"), noise(3), named_solver("dpmpp2m", schedule, 30, "uniform", 1e-3))
    fine = rollout(mixture(schedule, "flow"), noise(3), named_solver("heun", schedule, 200, "uniform", 1e-3))
    assert relative(out, fine) < 0.02 and grid("uniform", schedule, 3)[0] < 1


def test_attention_of_a_device_never_runs_by_cudnn() -> None:
    """Whose backward pass is wrong for some lengths; what was allowed before is so again, also after a failure."""
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for before in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(before)
            with pytest.raises(RuntimeError, match="within"), without_cudnn(torch.device("cuda")):
                assert not torch.backends.cuda.cudnn_sdp_enabled()
                raise RuntimeError("within")
            with without_cudnn(torch.device("cpu")):
                assert torch.backends.cuda.cudnn_sdp_enabled() == before
            assert torch.backends.cuda.cudnn_sdp_enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)
