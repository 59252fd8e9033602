"""The Generalized Solver against reference students, its forms, its guard, and files."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from toy import mixture, noise
from twin import relative

from gas_engine import GeneralizedSolver, MemoryPolicy, Schedule, load_solver, rollout, save_solver
from gas_engine.solvers import classical, grid
from gas_engine.solvers._times import guard

VP = Schedule.vp_linear(0.1, 20.0)


def student(golden, schedule, which, steps):
    wanted = {k.removeprefix(f"s{steps}_"): v for k, v in golden(f"student_theory_{which}_f64").items()}
    solver = GeneralizedSolver(steps, schedule, 1e-3)
    if which == "zero":
        assert relative(solver.theta, wanted["mu_logit"]) < 1e-12
    solver.load_state_dict(
        {
            "theta": wanted["mu_logit"],
            "xi": wanted["t_couple"],
            "phi_c": wanted["c_diff"].T,
            "phi_a": wanted["a_diff"].T,
        }
    )
    return solver, wanted


@pytest.mark.parametrize("steps", [4, 6])
@pytest.mark.parametrize("which", ["zero", "random"])
def test_students_match_reference(golden, tiny, which, steps):
    """x0, every step and every gradient, for every memory policy."""
    denoiser, inputs = tiny(1e-3), golden("inputs")
    solver, wanted = student(golden, denoiser.schedule, which, steps)
    assert relative(solver.times(), wanted["timesteps"]) < 1e-12
    for every in range(steps + 1):
        solver.zero_grad()
        states = []
        x0 = rollout(
            denoiser, inputs["noise"].double(), solver.tableau(), memory=MemoryPolicy(every),
            on_step=lambda n, x, states=states: states.append(x.clone()),
        )  # fmt: skip
        l1 = (x0 - inputs["target"].double()).abs().mean((1, 2, 3))
        l1.mean().backward()
        assert relative(x0, wanted["x0"]) < 1e-9
        assert relative(torch.stack(states), wanted["x_after_step"]) < 1e-9
        assert relative(l1, wanted["loss_l1"]) < 1e-9
        assert relative((x0 - inputs["target"]).square().mean((1, 2, 3)), wanted["loss_l2"]) < 1e-9
        assert relative(solver.theta.grad, wanted["g_mu_logit"]) < 1e-9
        assert relative(solver.xi.grad, wanted["g_t_couple"]) < 1e-9
        assert relative(solver.phi_c.grad, wanted["g_c_diff"].T) < 1e-9
        assert relative(solver.phi_a.grad, wanted["g_a_diff"].T) < 1e-9


@pytest.mark.parametrize("steps", [4, 6])
def test_float32_students_match_reference(golden, tiny, steps):
    denoiser, inputs = tiny(1e-3), golden("inputs")
    solver, wanted = student(golden, denoiser.schedule, "random", steps)
    x0 = rollout(denoiser, inputs["noise"].float(), solver.tableau())
    (x0 - inputs["target"]).abs().mean().backward()
    assert x0.dtype == torch.float32 and relative(x0, wanted["x0"]) < 1e-4
    for got, name in ((solver.theta, "mu_logit"), (solver.xi, "t_couple")):
        assert relative(got.grad, wanted[f"g_{name}"]) < 1e-4
    assert relative(solver.phi_c.grad, wanted["g_c_diff"].T) < 1e-4
    assert relative(solver.phi_a.grad, wanted["g_a_diff"].T) < 1e-4


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("theory", [True, "linear"])
def test_starts_as_dpm_solver(order, theory):
    times = grid("logSNR", VP, 5, 1e-3)
    solver = GeneralizedSolver(5, VP, 1e-3, order, theory=theory, start=times)
    base = classical.dpmpp(VP, times, order, lower_order_final=False).fold("data")
    tableau = solver.tableau()
    assert torch.allclose(tableau.A, base.A, atol=1e-9) and torch.allclose(tableau.B, base.B, atol=1e-9)
    assert torch.allclose(tableau.t_net, times[:-1], atol=1e-12)


def test_higher_orders_start_as_order_three():
    assert torch.allclose(
        GeneralizedSolver(6, VP).tableau().B, GeneralizedSolver(6, VP, order=3).tableau().B, atol=1e-14
    )


def test_form_without_theory_as_written_in_the_paper():
    """y = r x + C sum c_i m_{i-1};  x+ = r y + C sum a_i m_{i-1};  C = -alpha phi1; c starts at DPM-Solver++ / C."""
    solver = GeneralizedSolver(4, VP, theory=False)
    with torch.no_grad():
        solver.phi_a += 0.1 * torch.randn(4, 4, dtype=torch.float64)
    tableau, times = solver.tableau(), solver.times().detach()
    alpha, sigma, lam = VP(times)
    for n in range(4):
        ratio, gain = sigma[n + 1] / sigma[n], -alpha[n + 1] * torch.expm1(lam[n] - lam[n + 1])
        for lag in range(n + 1):
            wanted = gain * (ratio * solver.phi_c[n, lag] + solver.phi_a[n, lag])
            assert float(tableau.B[n, n - lag].detach()) == pytest.approx(float(wanted.detach()), rel=1e-12)
        assert float(tableau.A[n, n].detach()) == pytest.approx(float(ratio**2), rel=1e-12)
    base = classical.dpmpp(VP, times.detach(), 3, lower_order_final=False)
    alpha_phi = -alpha[1:] * torch.expm1(lam[:-1] - lam[1:])
    start = GeneralizedSolver(4, VP, theory=False).phi_c.detach()
    assert torch.allclose(start[:, 0] * alpha_phi, base.B.diagonal(), atol=1e-12)


@pytest.mark.parametrize("theory", [True, False, "linear"])
@pytest.mark.parametrize(("steps", "order"), [(1, 1), (2, 2), (3, 2), (5, 1), (5, 5)])
def test_tableau_gradient_by_finite_differences(theory, steps, order):
    solver = GeneralizedSolver(steps, VP, 1e-3, order, theory=theory)
    names = [name for name, p in solver.named_parameters() if p.numel()]
    values = [dict(solver.named_parameters())[name].detach().clone() + 0.01 for name in names]

    def numbers(*inputs):
        changed = dict(zip(names, inputs, strict=True))
        tableau = torch.func.functional_call(_AsModule(solver), {f"solver.{k}": v for k, v in changed.items()}, ())
        return tableau.A, tableau.B, tableau.t_net

    assert torch.autograd.gradcheck(numbers, [v.requires_grad_() for v in values])


class _AsModule(torch.nn.Module):
    def __init__(self, solver):
        super().__init__()
        self.solver = solver

    def forward(self):
        return self.solver.tableau("noise")


class _Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


def test_building_a_tableau_is_vectorised():
    """The number of tensor operations, forward and backward, does not depend on K."""
    counts = []
    for steps in (4, 8, 16, 32):
        solver = GeneralizedSolver(steps, VP)
        solver.tableau("data")  # index tables are made once for each K
        with _Count() as count:
            tableau = solver.tableau("data")
            (tableau.A.sum() + tableau.B.sum() + tableau.t_net.sum()).backward()
        counts.append(count.calls)
    assert max(counts) == min(counts)


@pytest.mark.parametrize("kind", ["uniform", "quadratic", "logSNR", "karras"])
@pytest.mark.parametrize("schedule", [VP, Schedule.flow(3.0)], ids=["vp", "flow"])
def test_theta_inverts_any_grid(kind, schedule):
    times = grid(kind, schedule, 7, 1e-3)
    assert torch.allclose(GeneralizedSolver(7, schedule, 1e-3, start=kind).times(), times, rtol=1e-9, atol=1e-12)


@given(st.lists(st.floats(-30, 30), min_size=5, max_size=5))
def test_times_always_fall(theta):
    solver = GeneralizedSolver(6, VP)
    with torch.no_grad():
        solver.theta.copy_(torch.tensor(theta))
    times = solver.times().detach()
    assert bool((times[1:] <= times[:-1]).all()) and float(times[0]) == 1.0 and float(times[-1].detach()) == 1e-3


@given(st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4))
def test_told_times_never_leave_the_domain(xi):
    for schedule in (VP, Schedule.flow(), Schedule.flow(0.4), Schedule.vp_discrete(torch.linspace(0.999, 0.01, 100))):
        t_eps = 1e-3 if schedule.kind != "vp_discrete" else 0.02
        solver = GeneralizedSolver(4, schedule, t_eps)
        with torch.no_grad():
            solver.xi.copy_(torch.tensor(xi, dtype=torch.float64))
        told = solver.told_times().detach()
        low, high = schedule.domain
        assert bool(((told > low) & (told < high)).all())
        assert bool(torch.isfinite(solver.tableau("noise").B).all())
        assert bool(torch.isfinite(torch.stack(schedule(told)[:2])).all()) and bool((schedule.sigma(told) > 0).all())


def test_guard_is_the_identity_inside_and_smooth_at_its_knees():
    t = torch.linspace(0.0006, 1.14, 501, dtype=torch.float64, requires_grad=True)
    bent = guard(t, 0.0, 1.25, 5e-4, 0.1)
    (slope,) = torch.autograd.grad(bent.sum(), t)
    assert torch.equal(bent, t) and float((slope - 1).abs().max()) == 0
    for knee in (5e-4, 1.15):
        around = torch.tensor([knee - 1e-9, knee + 1e-9], dtype=torch.float64, requires_grad=True)
        bent = guard(around, 0.0, 1.25, 5e-4, 0.1)
        (slope,) = torch.autograd.grad(bent.sum(), around)
        assert float((bent - around).abs().max()) < 1e-12 and float((slope - 1).abs().max()) < 1e-4
    far = torch.tensor([-3.0, -0.1, 1.3, 9.0], dtype=torch.float64, requires_grad=True)
    bent = guard(far, 0.0, 1.25, 5e-4, 0.1)
    (slope,) = torch.autograd.grad(bent.sum(), far)
    assert bool((slope > 0).all()) and bool(((bent > 0) & (bent < 1.25)).all())


def test_domain_is_wide_enough_for_what_training_does(golden):
    """Reference training tells the network times up to 1.05: they pass unchanged."""
    solver = GeneralizedSolver(4, VP)
    with torch.no_grad():
        solver.xi[0] = 0.1
    assert float(solver.told_times()[0].detach()) == pytest.approx(1.1, abs=1e-15)


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"steps": 0}, "got 0"),
        ({"steps": 33}, "got 33"),
        ({"order": 5}, "got 5"),
        ({"base": "rk4"}, "rk4"),
        ({"theory": "magic"}, "magic"),
        ({"start": "cosine"}, "cosine"),
        ({"start": [1.0, 0.5, 0.1]}, "must be 5"),
        ({"start": [0.9, 0.5, 0.4, 0.1, 1e-3]}, "from 1 to 0.001"),
        ({"t_eps": 2.0}, "2.0"),
    ],
)
def test_bad_input_names_the_value(options, seen):
    with pytest.raises(ValueError, match=seen):
        GeneralizedSolver(**{"steps": 4, "schedule": VP, **options})


# Files


def learned(schedule=VP, steps=4, theory=True):
    solver = GeneralizedSolver(steps, schedule, theory=theory)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in solver.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return solver


@pytest.mark.parametrize("schedule", [VP, Schedule.flow(3.0)], ids=["vp", "flow"])
@pytest.mark.parametrize("theory", [True, False, "linear"])
def test_file_round_trip_is_exact_and_small(tmp_path, schedule, theory, recwarn):
    solver, path = learned(schedule, theory=theory), tmp_path / "solver.safetensors"
    save_solver(solver, path, model="mixture", metrics={"l1": 0.1})
    again = load_solver(path, schedule=schedule, t_eps=1e-3, model="mixture")
    assert torch.equal(again.tableau("noise").B, solver.tableau("noise").B) and again.theory == theory
    assert again.schedule == schedule and again.facts["metrics"] == {"l1": 0.1} and not len(recwarn)
    assert path.stat().st_size < 4096 and list(tmp_path.iterdir()) == [path]


def test_file_for_something_else_warns_and_names_both(tmp_path):
    path = tmp_path / "solver.safetensors"
    save_solver(learned(), path, model="digits")
    with pytest.warns(UserWarning, match="'digits' and is used with 'mixture'"):
        load_solver(path, model="mixture")
    with pytest.warns(UserWarning, match=r"beta_1=20.* and is used with Schedule.flow"):
        load_solver(path, schedule=Schedule.flow())
    with pytest.warns(UserWarning, match=r"t_eps=0.001 and is used with t_eps=0.01"):
        load_solver(path, t_eps=0.01)


def test_damaged_files_are_refused(tmp_path):
    good = tmp_path / "solver.safetensors"
    save_solver(learned(), good)
    content = good.read_bytes()
    flipped = bytearray(content)
    flipped[-3] ^= 0x40
    cases = {
        "cut.safetensors": content[: len(content) // 2], "empty.safetensors": b"",
        "flipped.safetensors": bytes(flipped),        "text.pt": b"not a pickle",
    }  # fmt: skip
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            load_solver(tmp_path / name, schedule=VP, t_eps=1e-3)
    with pytest.raises(ValueError, match="no solver file"):
        load_solver(tmp_path / "absent.safetensors")
    save_file(load_file(good), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="not a solver of this package"):
        load_solver(tmp_path / "bare.safetensors")


def test_changed_facts_are_noticed(tmp_path):
    path = tmp_path / "solver.safetensors"
    save_solver(learned(), path)
    path.write_bytes(path.read_bytes().replace(b'"t_eps":"0.001"', b'"t_eps":"0.002"'))
    with pytest.raises(ValueError, match="corrupted"):
        load_solver(path)


def test_published_student(tmp_path):
    """{ema, model, optim, step} with a nameless list: theta, xi, c_1, a_1, c_2, a_2, ..."""
    solver = learned()
    rows = [solver.theta, solver.xi]
    for lag in range(4):
        rows += [solver.phi_c[:, lag], solver.phi_a[:, lag]]
    shadow = [row.detach().clone() for row in rows]
    content = {"ema": {"shadow_params": shadow, "decay": 0.999, "num_updates": 3}, "model": {}, "optim": {}, "step": 3}
    torch.save(content, tmp_path / "student.pt")
    again = load_solver(tmp_path / "student.pt", schedule=VP, t_eps=1e-3)
    assert torch.equal(again.tableau().B, solver.tableau().B) and torch.equal(again.times(), solver.times())
    with pytest.raises(ValueError, match="give schedule= and t_eps="):
        load_solver(tmp_path / "student.pt")
    torch.save({**content, "ema": {"shadow_params": shadow[:3]}}, tmp_path / "short.pt")
    with pytest.raises(ValueError, match="3 tensors"):
        load_solver(tmp_path / "short.pt", schedule=VP, t_eps=1e-3)


def test_nothing_in_a_file_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"ema": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="not a published student"):
        load_solver(tmp_path / "evil.pt", schedule=VP, t_eps=1e-3)
    assert not (tmp_path / "executed").exists()


def test_file_describes_itself(tmp_path):
    from safetensors import safe_open

    save_solver(learned(), tmp_path / "solver.safetensors", model="digits", guidance=1.0)
    with safe_open(tmp_path / "solver.safetensors", framework="pt") as file:
        facts = {k: json.loads(v) for k, v in file.metadata().items()}
    assert {"family", "steps", "order", "base", "schedule", "t_eps", "guidance", "model", "checksum"} <= facts.keys()
    assert rollout(mixture(), noise(), load_solver(tmp_path / "solver.safetensors").tableau()).shape == noise().shape
