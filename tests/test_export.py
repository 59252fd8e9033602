"""GASScheduler of diffusers: the same numbers as rollout, and what diffusers expects of a scheduler."""

from __future__ import annotations

import inspect
import json
import pickle
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from pipelines import saved  # noqa: F401 (a fixture)

from gas_engine import Denoiser, GeneralizedSolver, Schedule, guided, rollout, save_solver
from gas_engine.architectures import network_label
from gas_engine.solvers import FAMILIES, classical

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
from gas_engine.export import GASScheduler, for_diffusers  # noqa: E402

SHAPE = (4, 8, 8)
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
SD = Schedule.vp_discrete(torch.cumprod(1 - BETAS, 0))
KINDS = {"noise": SD, "velocity": SD, "data": SD, "flow": Schedule.flow(shift=3.0)}


def learned(steps=4, schedule=SD, seed=0, scale=0.03, **options):
    """A solver whose numbers are all off their start, as training leaves them."""
    solver = GeneralizedSolver(steps, schedule, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in solver.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return solver


def noise(batch=2, dtype=torch.float32, seed=3):
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Network(torch.nn.Module):
    """A small nonlinear network of a state and a label, which it reads in float32, as networks do."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.mix = torch.nn.Parameter(torch.randn(4, 4, generator=generator) / 2, requires_grad=False)

    def forward(self, x, label, cond):
        wave = torch.sin(label.float() / 80).to(x.dtype)[:, None, None, None]
        return torch.tanh(torch.einsum("ij,bjhw->bihw", self.mix.to(x.dtype), x) + cond[:, None, None, None] * wave)


def denoiser(prediction, network):
    schedule = KINDS[prediction]

    def function(x, t, cond):
        return network(x, network_label(schedule, t).expand(len(x)), cond)

    return Denoiser(function, schedule, prediction, SHAPE, network=network)


def run(scheduler, model, x, steps=4, begin=None, **options):
    """What the loop of a pipeline does."""
    scheduler.set_timesteps(steps, device=x.device)
    timesteps = scheduler.timesteps[begin or 0 :]
    if begin is not None:
        scheduler.set_begin_index(begin)
    x = x * scheduler.init_noise_sigma
    for t in timesteps:
        output = model(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, return_dict=False, **options)[0]
    return x


@pytest.fixture
def scheduler():
    return GASScheduler.from_solvers([learned(4), learned(6)], "noise")


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("prediction", list(KINDS))
def test_the_same_samples_as_rollout(prediction, guidance):
    network = Network()
    solver = learned(5, KINDS[prediction])
    model = guided(denoiser(prediction, network), guidance, torch.zeros(1))
    with torch.no_grad():
        wanted = rollout(model, noise(), solver.tableau(prediction), torch.ones(2))

    def pipeline(x, t):
        both = network(torch.cat([x, x]), t.expand(2 * len(x)), torch.tensor([0.0, 0.0, 1.0, 1.0]))
        without, told = both.chunk(2)
        return without + guidance * (told - without)

    found = run(GASScheduler.from_solvers(solver, prediction), pipeline, noise(), 5)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize(
    "solver",
    [learned(4, order=2), learned(1), learned(4, theory=False), learned(4, base="unipc"),
     *(student(5, SD) for student in FAMILIES.values())],
)  # fmt: skip
def test_every_family_of_solvers(solver):
    network = Network()
    with torch.no_grad():
        wanted = rollout(denoiser("noise", network), noise(dtype=torch.float64), solver.tableau("noise"), torch.ones(2))

    def model(x, t):
        return network(x, t.expand(2), torch.ones(2))

    found = run(GASScheduler.from_solvers(solver, "noise"), model, noise(dtype=torch.float64), solver.steps)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction", ["noise", "velocity", "flow"])
@pytest.mark.parametrize("begin", [1, 3, 4])
def test_a_later_start_is_dpm_solver_on_the_learned_nodes(prediction, begin):
    network = Network()
    solver = learned(5, KINDS[prediction])
    with torch.no_grad():
        nodes = solver.times()[begin:]
        wanted = rollout(
            denoiser(prediction, network), noise(), classical.dpmpp(solver.schedule, nodes, 2), torch.ones(2)
        )
    scheduler = GASScheduler.from_solvers(solver, prediction)
    found = run(scheduler, lambda x, t: network(x, t.expand(2), torch.ones(2)), noise(), 5, begin)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert run(scheduler, lambda x, t: network(x, t.expand(2), torch.ones(2)), noise(), 5, 0).isfinite().all()


def test_half_precision_loses_nothing_between_steps(scheduler):
    """States come back in bfloat16; what rounding took away is there again in the next step."""
    network = Network()
    seen = []

    def model(x, t):
        seen.append(x.dtype)
        return network(x.float(), t.expand(2), torch.ones(2)).to(x.dtype)

    x = noise(dtype=torch.bfloat16)
    found = run(scheduler, model, x, 6)
    exact = run(scheduler, lambda x, t: model(x.bfloat16(), t).float(), x.float(), 6)
    assert found.dtype == torch.bfloat16 and set(seen) == {torch.bfloat16}
    assert torch.equal(found, exact.bfloat16())


def test_a_changed_state_is_taken_as_it_is(scheduler):
    """A callback or an inpainting mask replaces the latents between steps."""
    scheduler.set_timesteps(4)
    first = scheduler.step(noise(seed=1), scheduler.timesteps[0], noise(dtype=torch.bfloat16)).prev_sample
    changed = torch.full_like(first, 100.0)
    a, b = scheduler.config.solvers["4"]["A"][1], scheduler.config.solvers["4"]["B"][1]
    wanted = a[0] * noise(dtype=torch.bfloat16).float() + a[1] * 100 + (b[0] + b[1]) * noise(seed=1)
    found = scheduler.step(noise(seed=1), scheduler.timesteps[1], changed).prev_sample
    torch.testing.assert_close(found, wanted.bfloat16(), rtol=1e-2, atol=1e-2)


def test_timesteps_keep_their_fractions(scheduler):
    solver = learned(6)
    scheduler.set_timesteps(6, device="cpu")
    labels = network_label(SD, solver.told_times()).detach()
    assert scheduler.timesteps.dtype == torch.float32 and scheduler.timesteps.device.type == "cpu"
    assert torch.equal(scheduler.timesteps, labels.float()) and bool((labels != labels.round()).all())
    assert scheduler.num_inference_steps == 6 and len(scheduler) == scheduler.config.num_train_timesteps == 1000
    assert scheduler.order == 1 and scheduler.init_noise_sigma == 1.0


def test_no_solver_for_that_many_steps(scheduler):
    with pytest.raises(ValueError, match="no learned solver of 20 steps; num_inference_steps must be one of 4, 6"):
        scheduler.set_timesteps(20)


def test_what_flux_pipelines_pass(scheduler):
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.9, device="cpu")
    assert scheduler.num_inference_steps == 4
    with pytest.raises(ValueError, match="brings its own times; leave out sigmas"):
        scheduler.set_timesteps(sigmas=[1.0, 0.9, 0.5, 0.1])
    with pytest.raises(ValueError, match="brings its own times; leave out timesteps"):
        scheduler.set_timesteps(timesteps=[999, 600, 300, 100])


def test_out_of_turn(scheduler):
    x = noise()
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        scheduler.step(x, 999, x)
    with pytest.raises(ValueError, match="call set_timesteps before add_noise"):
        scheduler.add_noise(x, x, torch.tensor([999]))
    run(scheduler, lambda x, t: x, x)
    with pytest.raises(ValueError, match="all 4 steps are taken"):
        scheduler.step(x, 1, x)
    scheduler.set_timesteps(4)
    scheduler.step(x, 999, x)
    with pytest.raises(ValueError, match=r"shape \(1, 4, 8, 8\) after \(2, 4, 8, 8\)"):
        scheduler.step(x[:1], 1, x[:1])


# What the common tests of diffusers' schedulers ask for.


def test_config_round_trip_to_the_bit(scheduler, tmp_path):
    scheduler.save_pretrained(tmp_path)
    again = GASScheduler.from_pretrained(tmp_path)
    assert (
        again.config.solvers == scheduler.config.solvers == for_diffusers([learned(4), learned(6)], "noise")["solvers"]
    )
    assert dict(GASScheduler.from_config(scheduler.config).config) == dict(scheduler.config)
    results = [run(s, lambda x, t: torch.sin(x + t / 500), noise(), 6) for s in (scheduler, again)]
    assert torch.equal(*results)
    content = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert content["_class_name"] == "GASScheduler" and content["prediction_type"] == "epsilon"
    again.save_pretrained(tmp_path)  # over itself


def test_the_saved_directory_needs_diffusers_alone(scheduler, tmp_path):
    scheduler.save_pretrained(tmp_path)
    wanted = run(scheduler, lambda x, t: torch.sin(x + t / 500), noise(), 6)
    torch.save((noise(), wanted), tmp_path / "run.pt")
    script = """
import sys
sys.modules["gas_engine"] = None
sys.path.insert(0, sys.argv[1])
import torch
from gas_scheduler import GASScheduler
scheduler = GASScheduler.from_pretrained(sys.argv[1])
x, wanted = torch.load(sys.argv[1] + "/run.pt")
scheduler.set_timesteps(6)
for t in scheduler.timesteps:
    x = scheduler.step(torch.sin(x + t / 500), t, x).prev_sample
assert torch.equal(x, wanted)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, timeout=300)


def test_step_shapes_and_return_dict(scheduler):
    x = noise()
    scheduler.set_timesteps(4)
    first = scheduler.step(0.1 * x, scheduler.timesteps[1], x, generator=torch.manual_seed(0), eta=0.0)
    second = scheduler.step(0.1 * x, scheduler.timesteps[2], x)
    assert first.prev_sample.shape == second.prev_sample.shape == x.shape
    for n in (4, 1):
        one = GASScheduler.from_solvers(learned(n), "noise")
        one.set_timesteps(n)
        as_tuple = one.step(0.1 * x, one.timesteps[0], x, return_dict=False)
        one.set_timesteps(n)
        as_dict = one.step(0.1 * x, one.timesteps[0], x, return_dict=True)
        assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], as_dict.prev_sample)
    assert len(as_tuple) == 2  # one-step pipelines of PixArt take the second


def test_set_timesteps_twice_forgets(scheduler):
    model = Network()
    runs = [run(scheduler, lambda x, t: model(x, t.expand(2), torch.ones(2)), noise(), k) for k in (4, 6, 4)]
    assert torch.equal(runs[0], runs[2]) and not torch.equal(runs[0], runs[1])
    assert scheduler.step_index == 4 and scheduler.begin_index is None


def test_a_slice_of_timesteps_begins_in_the_middle(scheduler):
    """As pipelines do that know no set_begin_index: the label says where."""
    scheduler.set_timesteps(6)
    assert scheduler.step_index is None
    scheduler.step(noise(), scheduler.timesteps[2], noise())
    assert scheduler.step_index == 3


def test_scale_model_input_and_public_api(scheduler):
    x = noise()
    scheduler.set_timesteps(4)
    assert torch.equal(scheduler.scale_model_input(x, scheduler.timesteps[0]), x)
    accepted = set(inspect.signature(scheduler.set_timesteps).parameters)
    assert {"num_inference_steps", "device", "sigmas", "timesteps", "mu"} <= accepted
    assert "generator" in inspect.signature(scheduler.step).parameters
    assert {cls.__name__ for cls in scheduler.compatibles} >= {"DPMSolverMultistepScheduler", "UniPCMultistepScheduler"}
    assert torch.equal(
        run(deepcopy(scheduler), lambda x, t: x, x), run(pickle.loads(pickle.dumps(scheduler)), lambda x, t: x, x)
    )


@pytest.mark.parametrize("prediction", ["noise", "flow"])
def test_add_noise(prediction):
    scheduler = GASScheduler.from_solvers(learned(4, KINDS[prediction]), prediction)
    scheduler.set_timesteps(4)
    x, e = noise(3), noise(3, seed=9)
    alphas, sigmas, _ = KINDS[prediction](learned(4, KINDS[prediction]).times().detach())
    found = scheduler.add_noise(x, e, scheduler.timesteps[[0, 2, 3]])
    for row, node in enumerate((0, 2, 3)):
        torch.testing.assert_close(found[row], (alphas[node] * x[row] + sigmas[node] * e[row]).float())
    with pytest.raises(ValueError, match=r"noise can be added at .*; got 500"):
        scheduler.add_noise(x, e, torch.tensor([500, 500, 500]))
    scheduler.set_begin_index(2)
    found = scheduler.scale_noise(x.bfloat16(), scheduler.timesteps[2:3].repeat(3), e.bfloat16())
    assert found.dtype == torch.bfloat16 and found.shape == x.shape
    torch.testing.assert_close(found.float(), (alphas[2] * x + sigmas[2] * e).float(), rtol=0.02, atol=0.02)
    scheduler.step(x, scheduler.timesteps[2], x)  # inpainting then wants the node of the next step
    torch.testing.assert_close(scheduler.add_noise(x, e, torch.zeros(1)), (alphas[3] * x + sigmas[3] * e).float())


def test_configs_of_other_schedulers_survive(scheduler):
    """There and back: the pipeline's own numbers stay in the config."""
    own = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    with pytest.raises(ValueError, match="this config holds no learned solvers"):
        GASScheduler.from_config(own.config)
    ours = GASScheduler.from_config(own.config, **for_diffusers(learned(4), "noise"))
    back = diffusers.DPMSolverMultistepScheduler.from_config(ours.config)
    assert back.config.beta_start == 0.00085 and back.config.beta_schedule == "scaled_linear"


def test_bad_solvers(tmp_path):
    with pytest.raises(ValueError, match=r"one for each number of steps, got \[4, 4\]"):
        GASScheduler.from_solvers([learned(4), learned(4)], "noise")
    with pytest.raises(ValueError, match="two schedules"):
        GASScheduler.from_solvers([learned(4), learned(6, Schedule.flow())], "noise")
    with pytest.raises(ValueError, match=r"vp_linear.* export to k-diffusion or ComfyUI"):
        GASScheduler.from_solvers(learned(4, Schedule.vp_linear()), "noise")
    with pytest.raises(ValueError, match="prediction is 'epsilon'"):
        GASScheduler.from_solvers(learned(4), "epsilon")
    save_solver(learned(4), tmp_path / "k4.safetensors")
    config = for_diffusers(tmp_path / "k4.safetensors", "noise")
    config["solvers"]["4"]["A"][2] = [1.0]
    with pytest.raises(ValueError, match="the solver of 4 steps is damaged"):
        GASScheduler(**config)
