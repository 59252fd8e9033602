"""Students: where they start, what they are made of, what of them is trained, and what is kept of them."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from math import expm1, hypot, log2

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import options, rows, toy_trainer
from toy import SHAPE, mixture, noise
from twin import plain_rollout, relative

from gas_engine import (
    BELMSolver,
    Denoiser,
    GeneralizedSolver,
    MemoryPolicy,
    Schedule,
    load_solver,
    rollout,
    save_solver,
    train,
)
from gas_engine.memory import BitsLost
from gas_engine.ops import ResidualCodes
from gas_engine.solvers import (
    FAMILIES,
    AlternatingS4SSolver,
    BNSSolver,
    DyWeightSolver,
    LD3Solver,
    S4SSolver,
    classical,
    grid,
)
from gas_engine.solvers.files import write_readable
from gas_engine.solvers.named import ALIASES, MAKERS
from gas_engine.solvers.s4s import TURN
from gas_engine.training.directory import RunDirectory

VP = Schedule.vp_linear(0.1, 20.0)
SCHEDULES = {
    "vp_linear": VP,
    "vp_discrete": Schedule.vp_discrete(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)),
    "edm": Schedule.edm(sigma_min=0.002, sigma_max=80.0),
    "flow": Schedule.flow(2.0),
}
BASES = sorted(MAKERS.keys() - {"heun"})
STEPS = 5
# For each student the numbers that it trains, of K.
COUNTS = {
    "gs": lambda k: 2 * k - 1 + 2 * k * k,
    "s4s": lambda k: k * (k + 1) // 2,
    "s4s-alt": lambda k: k * (k + 1) // 2 + 2 * k - 1,
    "ld3": lambda k: 2 * k - 1,
    "bns": lambda k: k - 1 + k + k * (k + 1) // 2,
    "dyweight": lambda k: k - 1 + k * (k + 1) // 2,
    "belm": lambda k: 5 * k - 1,
}


def perturbed(solver, scale=0.02):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in solver.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return solver


def result(tableau, denoiser):
    with torch.no_grad():
        return rollout(denoiser, noise(), tableau)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_base_starts_as_its_classical_solver(kind, base):
    """GS and LD3 with every number of the tableau; BNS, whose tableau is another one, in what it computes."""
    schedule, prediction = SCHEDULES[kind], "flow" if kind == "flow" else "noise"
    times = grid("quadratic", schedule, STEPS)
    wanted = MAKERS["dpmpp3m-full" if base == "dpmpp3m" else base](schedule, times).fold(prediction)
    with torch.no_grad():
        found = GeneralizedSolver(STEPS, schedule, base=base, start="quadratic").tableau(prediction)
        assert relative(found.A, wanted.A) < 1e-12 and relative(found.B, wanted.B) < 1e-12
        wanted = MAKERS[base](schedule, times)
        ld3, bns = (student(STEPS, schedule, base=base, start="quadratic") for student in (LD3Solver, BNSSolver))
        found = ld3.tableau(prediction)
        assert relative(found.A, wanted.fold(prediction).A) < 1e-12
        assert relative(found.B, wanted.fold(prediction).B) < 1e-12 and torch.allclose(found.t_net, times[:-1])
    denoiser = mixture(schedule, prediction)
    assert relative(result(bns.tableau(prediction), denoiser), result(wanted, denoiser)) < 1e-9


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_multistep_weights_start_at_their_base(kind, base):
    schedule, times = SCHEDULES[kind], grid("quadratic", SCHEDULES[kind], STEPS)
    wanted = MAKERS[base](schedule, times)
    for student in (S4SSolver, AlternatingS4SSolver):
        solver = student(STEPS, schedule, base=base, start="quadratic")
        found = solver.tableau("data").B
        assert solver.of == wanted.prediction and relative(found, wanted.fold("data").B) < 1e-9


def test_dyweight_starts_as_ipndm_and_for_a_flow_as_adams_bashforth_of_its_velocity():
    times = grid("quadratic", VP, 6)
    found, wanted = DyWeightSolver(6, VP, start="quadratic").tableau("noise"), classical.ipndm(VP, times).fold("noise")
    assert relative(found.A, wanted.A) < 1e-12 and relative(found.B, wanted.B) < 1e-12
    flow = SCHEDULES["flow"]
    times, b = grid("quadratic", flow, 6), DyWeightSolver(6, flow, start="quadratic").tableau("flow").B.detach()
    assert float(b[0, 0]) == pytest.approx(float(flow(times)[1].diff()[0]), rel=1e-9)
    steps = flow(times)[1].diff()
    assert torch.allclose(b[3:] / steps[3:, None], _shifted(torch.tensor([-9, 37, -59, 55]).double() / 24), atol=1e-9)


def _shifted(weights):
    return torch.stack([torch.cat([torch.zeros(n), weights, torch.zeros(2 - n)]) for n in range(3)])


def test_weights_that_sum_to_s_make_a_step_s_times_as_long():
    """Of a constant gradient: what DyWeight's rows say about the effective time."""
    solver = DyWeightSolver(4, SCHEDULES["edm"], start="quadratic")
    with torch.no_grad():
        solver.weights[1:3] *= 1.25  # the row of step 1
        tableau, (alpha, sigma, _) = solver.tableau("noise"), solver.schedule(solver.times())
        u = sigma / alpha
        assert float(tableau.B[1].sum() / alpha[2]) == pytest.approx(1.25 * float(u[2] - u[1]), rel=1e-12)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_belm_starts_of_second_order(kind):
    """Step by step against the formulas, with a floor of 0.01 under A[n,n-1], which A[n,n] makes up for; Euler first.
    A walk back would lose log2 1 / A[n,n-1] bits."""
    schedule, solver = SCHEDULES[kind], BELMSolver(STEPS, SCHEDULES[kind], start="quadratic")
    alpha, sigma, lam = (values.tolist() for values in schedule(grid("quadratic", schedule, STEPS)))
    h = [after - before for before, after in pairwise(lam)]
    a, b = torch.zeros(2, STEPS, STEPS, dtype=torch.float64)
    a[0, 0], b[0, 0] = sigma[1] / sigma[0], -alpha[1] * expm1(-h[0])
    for n in range(1, STEPS):
        q2 = (h[n] / h[n - 1]) ** 2
        below = hypot(q2 * sigma[n + 1] / sigma[n - 1], 0.01)
        floor = below - q2 * sigma[n + 1] / sigma[n - 1]
        a[n, n - 1], a[n, n] = below, (1 - q2) * sigma[n + 1] / sigma[n] - floor * sigma[n - 1] / sigma[n]
        b[n, n] = alpha[n + 1] - a[n, n - 1] * alpha[n - 1] - a[n, n] * alpha[n]
    found = solver.tableau("data")
    rounding = 1e-12 + 2e-16 / alpha[0]  # folding divides by alpha, which is 5e-7 where a flow starts
    assert relative(found.A, a) < rounding and relative(found.B, b) < 1e-12 and found.reversible
    lost = [max(0.0, -log2(v)) for v in a.diagonal(-1).tolist()]
    assert solver.bits_lost().tolist() == pytest.approx(lost, rel=1e-9) and max(lost) > 0.1


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("apart", [0.0, 0.5])
def test_belm_is_exact_for_a_constant_data_estimate(kind, apart):
    """The estimate comes in with alpha and the noise goes with sigma, whatever A[n,n-1] is."""
    schedule, data = SCHEDULES[kind], torch.linspace(-1, 1, 18, dtype=torch.float64).view(SHAPE)
    solver = BELMSolver(STEPS, schedule, start="quadratic")
    with torch.no_grad():
        solver.phi_r += apart * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
        alpha, sigma, _ = schedule(solver.times())
    found = result(solver.tableau("data"), Denoiser(lambda x, t, cond: data.expand_as(x), schedule, "data", SHAPE))
    assert relative(found, alpha[-1] * data + sigma[-1] / sigma[0] * (noise() - alpha[0] * data)) < 1e-12


def test_bits_of_codes_are_counted():
    """log2 of all the distances that a code of its size tells apart, escapes included."""
    meter = BitsLost()
    meter.add(ResidualCodes(torch.tensor([0, 1, -1, 3], dtype=torch.int8), torch.zeros(0), torch.zeros(0)))
    assert meter.mean == pytest.approx((2 * log2(3) + log2(7)) / 4) and meter.escaped == 0
    meter.add(ResidualCodes(torch.tensor([-128], dtype=torch.int8), torch.zeros(1), torch.zeros(1)))
    assert meter.mean == pytest.approx((2 * log2(3) + log2(7) + log2(257)) / 5) and meter.escaped == 1 / 5


@pytest.mark.parametrize("family", FAMILIES)
@given(steps=st.integers(1, 12))
@settings(max_examples=5, deadline=None)
def test_shapes_and_numbers_of_parameters(family, steps):
    solver = FAMILIES[family](steps, VP)
    parameters = dict(solver.named_parameters())
    trained = {name for step in range(2 * TURN) for name in solver.trained(step)}
    assert sum(parameters[name].numel() for name in trained) == COUNTS[family](steps)
    tableau = solver.tableau("velocity")
    assert tableau.steps == steps and tableau.nodes.shape == (steps + 1,)
    assert all(p.dtype == torch.float64 and p.device.type == "cpu" for p in parameters.values())


MADE = {
    "s4s": partial(S4SSolver, base="ipndm2"),
    "s4s-alt": AlternatingS4SSolver,
    "ld3-unipc": partial(LD3Solver, base="unipc3-bh2"),
    "ld3-deis": partial(LD3Solver, base="deis"),
    "bns": BNSSolver,
    "dyweight": DyWeightSolver,
    "gs-unipc": partial(GeneralizedSolver, base="unipc2-bh1"),
    "gs-deis": partial(GeneralizedSolver, base="deis3", order=2),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
@pytest.mark.parametrize("kind", ["vp_linear", "flow"])
def test_gradients_equal_plain_autograd_for_every_policy(make, kind):
    """float64, by what is trained and what is not; policies agree to the bit."""
    schedule, prediction = SCHEDULES[kind], "flow" if kind == "flow" else "noise"
    solver, denoiser = perturbed(make(4, schedule, 1e-2), 1e-3), mixture(schedule, prediction)
    for step in (0, TURN):
        for name, p in solver.named_parameters():
            p.requires_grad_(name in solver.trained(step))

        def gradients(run, solver=solver, denoiser=denoiser, **options):
            solver.zero_grad()
            run(denoiser, noise(), solver.tableau(prediction), **options).sin().sum().backward()
            return torch.cat([p.grad.flatten() for p in solver.parameters() if p.grad is not None])

        wanted = gradients(plain_rollout)
        found = [gradients(rollout, memory=MemoryPolicy(every)) for every in (0, 1, 3)]
        assert relative(found[0], wanted) < 1e-10 and wanted.abs().max() > 0
        assert all(torch.equal(other, found[0]) for other in found[1:])


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_tableau_gradient_by_finite_differences(make):
    solver = make(4, VP)
    names = [name for name, _ in solver.named_parameters()]

    def numbers(*values):
        return torch.func.functional_call(_Module(solver), {f"s.{n}": v for n, v in zip(names, values, strict=True)})

    values = [p.detach().clone().requires_grad_() for _, p in solver.named_parameters()]
    assert torch.autograd.gradcheck(numbers, values, atol=1e-5, rtol=1e-4)


class _Module(torch.nn.Module):
    def __init__(self, solver):
        super().__init__()
        self.s = solver

    def forward(self):
        tableau = self.s.tableau("data")
        return tableau.A, tableau.B, tableau.t_net


@pytest.mark.parametrize("make", [*MADE.values(), *FAMILIES.values()])
def test_files_are_read_back_to_the_bit(tmp_path, make):
    solver = perturbed(make(4, SCHEDULES["vp_discrete"]))
    save_solver(solver, tmp_path / "s.safetensors", model="mixture")
    write_readable(solver, tmp_path / "s.json")
    for path in tmp_path.iterdir():
        again = load_solver(path, schedule=solver.schedule, t_eps=1e-3)
        assert type(again) is type(solver) and again.config() == solver.config()
        assert all(torch.equal(getattr(again.tableau("noise"), n), getattr(solver.tableau("noise"), n)) for n in "AB")


@pytest.mark.parametrize("optimizer", ["adam", "soap"])
def test_times_and_weights_take_turns_and_a_resumed_run_knows_whose_it_is(tmp_path, optimizer):
    """One set moves at a time, with nothing of the other's moments; resumed in the middle of a turn, bit for bit."""
    new = partial(toy_trainer, student=AlternatingS4SSolver, optimizer=optimizer, iterations=2 * TURN + 4)
    whole, first, second = new(), new(), new()
    while not whole.finished:
        before = {name: p.detach().clone() for name, p in whole.solver.named_parameters()}
        whole.update()
        moved = {name for name, p in whole.solver.named_parameters() if not torch.equal(p, before[name])}
        assert moved == ({"theta", "xi"} if (whole.step - 1) // TURN % 2 else {"weights"})
    while first.step < TURN + 3:
        first.update()
    directory = RunDirectory(tmp_path)
    directory.save(first.step, *first.state())
    second.load(*directory.restore())
    while not second.finished:
        second.update()
    found, wanted = second.state()[0], whole.state()[0]
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("family", ["s4s", "ld3", "bns", "dyweight"])
def test_what_is_not_trained_stays_to_the_bit_and_the_loss_falls(family):
    trainer = toy_trainer(student=FAMILIES[family], optimizer="soap", iterations=30)
    before = {name: p.detach().clone() for name, p in trainer.solver.named_parameters()}
    losses = [float(loss) for _, loss in trainer]
    for solver in (trainer.solver, trainer.average):
        stays = {name for name, p in solver.named_parameters() if torch.equal(p, before[name])}
        assert stays == before.keys() - set(trainer.solver.trained(0))
    assert sum(losses[-5:]) < sum(losses[:5])


def test_the_verb_trains_resumes_and_begins_with_a_student(small, no_pictures, tmp_path):
    short = [
        "--student",
        "s4s-alt",
        "--steps",
        "3",
        "--log-every",
        "1",
        "--evaluation",
        "student",
        "--evaluate-every",
        "0",
    ]
    out = tmp_path / "run"
    train.main(options(out, *short, "--iterations", "2"))
    solver = load_solver(out / "solver.safetensors")
    assert solver.family == "s4s-alt" and len(rows(out)) == 2
    assert "learned (s4s-alt)" in (out / "comparison.md").read_text()
    train.main(options(tmp_path / "next", *short, "--iterations", "1", "--start-from", str(out / "solver.safetensors")))
    train.main(["--out", str(out), "--resume", "--device", "cpu", "--evaluation", "student"])
    assert torch.equal(load_solver(out / "solver.safetensors").tableau().B, solver.tableau().B)


def test_forms_and_bases_are_named_in_the_table(small, no_pictures, tmp_path):
    short = ["--iterations", "1", "--evaluation", "student", "--evaluate-every", "0"]
    train.main(options(tmp_path / "a", *short, "--form", "linear"))
    assert "learned (gs, linear form)" in (tmp_path / "a" / "comparison.md").read_text()
    train.main(options(tmp_path / "b", *short, "--student", "ld3", "--base", "ipndm"))
    assert "learned (ld3, base ipndm)" in (tmp_path / "b" / "comparison.md").read_text()
    assert load_solver(tmp_path / "b" / "solver.safetensors").base == ALIASES["ipndm"]


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["--student", "s4s", "--form", "linear"], "--student s4s takes no --form, got linear"),
        (["--student", "ld3", "--order", "2"], "takes no --order, got 2"),
        (["--student", "dyweight", "--base", "deis"], "takes no --base, got deis"),
        (["--student", "s4s", "--base", "heun"], "heun takes two evaluations a step"),
        (["--student", "ld3", "--base", "rk45"], "unknown base solver 'rk45'; known: "),
        (["--base", "ipndm", "--form", "s4s"], "the form s4s is of the base dpmpp3m, got base 'ipndm'"),
    ],
)
def test_combinations_without_meaning_are_refused_in_a_sentence(small, tmp_path, capsys, words, seen):
    with pytest.raises(SystemExit) as error:
        train.main(options(tmp_path / "run", *words))
    assert error.value.code == 2 and seen in " ".join(capsys.readouterr().err.split())
