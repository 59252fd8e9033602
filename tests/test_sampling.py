"""Sampling, teacher sets and models from the command line, and their refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from PIL import Image
from toy import SHAPE
from twin import plain_rollout, relative

from gas_engine import GeneralizedSolver, load_denoiser, load_solver, sample, save_solver, teacher
from gas_engine.adapters.edm import save_edm
from gas_engine.denoiser import seeded
from gas_engine.files import atomic
from gas_engine.networks import build_edm
from gas_engine.solvers.named import named_solver
from gas_engine.teacher import TeacherSolver, load_teacher_set, make_teacher_set

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def beside_the_toy_model(monkeypatch):
    monkeypatch.chdir(HERE)


def drawn(out, *options):
    sample.main(["--model", "toy:make", "--format", "npy", "--out", str(out), "--device", "cpu", *options])
    return np.load(out / "samples.npy")


def failure(capsys, run, argv):
    with pytest.raises(SystemExit) as stop:
        run(argv)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(error.splitlines()) == 1 and "Traceback" not in error
    return error


def test_classical_sampling_equals_a_plain_loop(tmp_path):
    got = drawn(tmp_path, "--solver", "dpmpp2m", "--steps", "5", "--grid", "logSNR", "--seeds", "3-9")
    denoiser = toy.make()
    noise, cond = seeded(denoiser, range(3, 10))
    tableau = named_solver("dpmpp2m", denoiser.schedule, 5, "logSNR", denoiser.t_eps)
    assert got.dtype == np.float32 and got.shape == (7, *SHAPE)
    assert relative(torch.from_numpy(got), plain_rollout(denoiser, noise, tableau, cond)) < 1e-5


def test_samples_do_not_depend_on_the_batch(tmp_path):
    options = ("--solver", "unipc", "--steps", "4", "--seeds", "0-6")
    assert np.allclose(drawn(tmp_path / "a", *options), drawn(tmp_path / "b", *options, "--batch", "2"), atol=1e-6)


def test_learned_solver_given_noise_and_classes(tmp_path):
    denoiser = toy.make()
    solver = GeneralizedSolver(3, denoiser.schedule, start="quadratic")
    save_solver(solver, tmp_path / "solver.safetensors", model="toy:make")
    noise = torch.randn(5, *SHAPE)
    np.save(tmp_path / "noise.npy", noise.numpy())
    got = drawn(
        tmp_path, "--solver", str(tmp_path / "solver.safetensors"), "--noise", str(tmp_path / "noise.npy"),
        "--classes", "0-1",
    )  # fmt: skip
    wanted = plain_rollout(denoiser, noise, solver.tableau(), torch.tensor([0, 1, 0, 1, 0]))
    assert relative(torch.from_numpy(got), wanted) < 1e-5


def test_published_student_samples(tmp_path):
    solver = GeneralizedSolver(2, toy.make().schedule)
    rows = [solver.theta, solver.xi, *(p[:, i] for i in range(2) for p in (solver.phi_c, solver.phi_a))]
    torch.save({"ema": {"shadow_params": [row.detach() for row in rows]}}, tmp_path / "student.pt")
    got = drawn(tmp_path, "--solver", str(tmp_path / "student.pt"), "--seeds", "0-2")
    noise, cond = seeded(toy.make(), range(3))
    assert relative(torch.from_numpy(got), plain_rollout(toy.make(), noise, solver.tableau(), cond)) < 1e-5


def test_picture_grid(tmp_path):
    sample.main(["--model", "digits", "--solver", "ipndm2", "--steps", "3", "--seeds", "0-18", "--out", str(tmp_path)])
    with Image.open(tmp_path / "samples.png") as image:
        assert image.width > 300 and image.height > 200


def test_solver_for_another_model_or_schedule_warns(tmp_path, capsys):
    from gas_engine import Schedule

    save_solver(GeneralizedSolver(2, Schedule.vp_linear(0.1, 15.0)), tmp_path / "solver.safetensors", model="digits")
    drawn(tmp_path, "--solver", str(tmp_path / "solver.safetensors"), "--seeds", "0-1")
    error = capsys.readouterr().err
    assert "'digits' and is used with 'mixture'" in error and "beta_1=15" in error and "beta_1=20" in error


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        (["--model", "nothing", "--steps", "4"], "unknown model 'nothing'"),
        (["--model", "missing.safetensors", "--steps", "4"], "missing.safetensors"),
        (["--solver", "rk45", "--steps", "4"], "unknown solver 'rk45'"),
        (["--solver", "unipc"], "needs --steps"),
        (["--solver", "unipc", "--steps", "0"], "got 0"),
        (["--solver", "unipc", "--steps", "4", "--grid", "odd"], "'odd'"),
        (["--solver", "unipc", "--steps", "4", "--seeds", "9-1"], "'9-1'"),
        (["--solver", "unipc", "--steps", "4", "--classes", "10"], "from 0 to 9"),
        (["--solver", "unipc", "--steps", "4", "--batch", "0"], "got 0"),
        (["--solver", "absent.safetensors"], "absent.safetensors"),
        (["--solver", "unipc", "--steps", "4", "--t-eps", "7"], "got 7.0"),
        (["--model", "toy:make_broken", "--solver", "unipc", "--steps", "4"], "not finite"),
    ],
)
def test_bad_input(tmp_path, capsys, options, seen):
    base = [] if "--model" in options else ["--model", "toy:make"]
    error = failure(capsys, sample.main, [*base, *options, "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert seen in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        (np.zeros((2, 3, 3), np.float32), "float32 (2, 3, 3)"),
        (np.zeros((2, *SHAPE), np.int64), "int64"),
        (np.full((2, *SHAPE), np.nan, np.float32), "not finite"),
        (np.zeros((0, *SHAPE), np.float32), "(0, 2, 3, 3)"),
        (b"no array", "cannot read the noise"),
    ],
)
def test_noise_that_does_not_fit(tmp_path, capsys, content, seen):
    path = tmp_path / "noise.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    argv = ["--model", "toy:make", "--solver", "unipc", "--steps", "2", "--noise", str(path)]
    assert seen in failure(capsys, sample.main, [*argv, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_solver_with_other_steps_is_refused(tmp_path, capsys):
    save_solver(GeneralizedSolver(2, toy.make().schedule), tmp_path / "solver.safetensors")
    argv = ["--model", "toy:make", "--solver", str(tmp_path / "solver.safetensors"), "--steps", "3"]
    assert "solver of 2 steps, but --steps 3" in failure(capsys, sample.main, argv)


# Models


def test_edm_network_file(tmp_path):
    kwargs = {
        "img_resolution": 8, "img_channels": 1, "model_type": "SongUNet", "model_channels": 16, "channel_mult": [1],
        "num_blocks": 1, "attn_resolutions": [],
    }  # fmt: skip
    network = build_edm(kwargs)
    save_edm(network, kwargs, tmp_path / "net.safetensors", t_eps=1e-4)
    denoiser = load_denoiser(str(tmp_path / "net.safetensors"))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor(0.4, dtype=torch.float64)
    alpha, sigma, _ = denoiser.schedule(t)
    assert torch.equal(denoiser(x, t), network(x / alpha.float(), sigma / alpha)) and denoiser.t_eps == 1e-4
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "net.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut\.safetensors"):
        load_denoiser(str(tmp_path / "cut.safetensors"))
    save_solver(GeneralizedSolver(2, denoiser.schedule), tmp_path / "solver.safetensors")
    with pytest.raises(ValueError, match="not an EDM network"):
        load_denoiser(str(tmp_path / "solver.safetensors"))


def test_factory_must_return_a_denoiser():
    with pytest.raises(ValueError, match="returned Tensor"):
        load_denoiser("toy:noise")


def test_digits_are_recognisable():
    """Nine in ten samples look, to their nearest neighbours in the data, like the class they were asked for."""
    from gas_engine.adapters.digits import digit_images

    denoiser = load_denoiser("digits")
    _, classes = seeded(denoiser, range(100))
    images, labels = digit_images()
    samples = teacher.teacher_samples(denoiser, range(100), TeacherSolver())
    nearest = torch.cdist(samples.flatten(1), images.flatten(1)).topk(5, largest=False).indices
    assert float((labels[nearest].mode(1).values == classes).float().mean()) > 0.9
    assert images.shape == (1797, 1, 8, 8) and float(images.min()) == -1 and float(images.max()) == 1


# Seeds and teacher sets


def test_noise_follows_from_the_seed_alone():
    denoiser = toy.make()
    noise, cond = seeded(denoiser, [5, 6, 7])
    again, class_again = seeded(denoiser, [7, 5])
    assert torch.equal(noise[2], again[0]) and torch.equal(noise[0], again[1]) and cond[2] == class_again[0]
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(noise[0], torch.randn(SHAPE, generator=generator))


def teacher_argv(out, *more):
    return ["--model", "toy:make", "--seeds", "0-9", "--shard", "4", "--out", str(out), "--device", "cpu", *more]


def test_teacher_set(tmp_path):
    teacher.main(teacher_argv(tmp_path / "set", "--batch", "3"))
    index = json.loads((tmp_path / "set" / "index.json").read_text())
    assert [len(shard["seeds"]) for shard in index["shards"]] == [4, 4, 2]
    seeds, samples = load_teacher_set(tmp_path / "set")
    denoiser = toy.make()
    noise, cond = seeded(denoiser, seeds)
    tableau = named_solver("unipc3-bh1", denoiser.schedule, 20, "logSNR", 1e-4)
    assert seeds == list(range(10)) and relative(samples, plain_rollout(denoiser, noise, tableau, cond)) < 1e-5
    size = sum(path.stat().st_size for path in (tmp_path / "set").glob("*.safetensors"))
    assert size < 2 * samples.numel() * 4 + 2000, "noise is not stored"


def test_teacher_set_resumes_and_mends(tmp_path, monkeypatch):
    out, counted = tmp_path / "set", []
    teacher.main(teacher_argv(out))
    wanted = load_teacher_set(out)[1]
    shards = sorted(out.glob("*.safetensors"))
    shards[0].write_bytes(b"damaged")
    shards[2].unlink()
    original = teacher.teacher_samples
    monkeypatch.setattr(
        teacher, "teacher_samples", lambda d, seeds, *a, **k: (counted.extend(seeds), original(d, seeds, *a, **k))[1]
    )
    teacher.main(teacher_argv(out))
    assert counted == [0, 1, 2, 3, 8, 9] and torch.equal(load_teacher_set(out)[1], wanted)


def test_teacher_set_grows_and_keeps_what_it_has(tmp_path):
    out = tmp_path / "set"
    teacher.main(teacher_argv(out))
    before = load_teacher_set(out)
    teacher.main([*teacher_argv(out)[:3], "8-13", *teacher_argv(out)[4:]])
    seeds, samples = load_teacher_set(out)
    assert seeds == list(range(14)) and torch.equal(samples[:10], before[1])


def test_teacher_set_of_other_weights_is_refused(tmp_path):
    denoiser = toy.make()
    make_teacher_set(denoiser, range(2), TeacherSolver(), tmp_path)
    denoiser.function.means.mul_(0.5)
    with pytest.raises(ValueError, match="another fingerprint"):
        make_teacher_set(denoiser, range(2), TeacherSolver(), tmp_path)


def test_killed_teacher_loses_at_most_a_shard(tmp_path):
    """A process that dies while it writes leaves whole shards and an index that tells the truth."""
    code = (
        "import os, sys, toy\nfrom gas_engine import teacher\noriginal = teacher.sha256\ncount = []\n"
        "def dying(path):\n    count.append(1)\n    if len(count) == 2: os._exit(9)\n    return original(path)\n"
        "teacher.sha256 = dying\nteacher.main(sys.argv[1:])"
    )
    out = tmp_path / "set"
    died = subprocess.run([sys.executable, "-c", code, *teacher_argv(out)], cwd=HERE, capture_output=True)
    assert died.returncode == 9
    assert len(json.loads((out / "index.json").read_text())["shards"]) == 1
    teacher.main(teacher_argv(out))
    assert load_teacher_set(out)[0] == list(range(10))


@pytest.mark.parametrize(
    ("more", "seen"),
    [
        (["--steps", "9"], "another steps (20, now 9)"),
        (["--grid", "uniform"], "another grid"),
        (["--batch", "0"], "got 0"),
        (["--solver", "nope"], "nope"),
    ],
)
def test_teacher_refuses(tmp_path, capsys, more, seen):
    teacher.main(teacher_argv(tmp_path / "set"))
    before = {path: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    capsys.readouterr()
    assert seen in failure(capsys, teacher.main, teacher_argv(tmp_path / "set", *more))
    assert {path: path.read_bytes() for path in (tmp_path / "set").iterdir()} == before


def test_incomplete_teacher_sets_are_named(tmp_path):
    with pytest.raises(ValueError, match="no teacher set"):
        load_teacher_set(tmp_path)
    make_teacher_set(toy.make(), range(4), TeacherSolver(), tmp_path / "set", shard=2)
    next((tmp_path / "set").glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(ValueError, match="missing or damaged"):
        load_teacher_set(tmp_path / "set")


def test_atomic_writes_leave_the_old_file_on_failure(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_command_lists_its_verbs(capsys, monkeypatch):
    from gas_engine import __main__

    monkeypatch.setattr(sys, "argv", ["gas-engine"])
    __main__.main()
    out = capsys.readouterr().out
    assert all(verb in out for verb in ("train", "sample", "teacher", "doctor"))
    monkeypatch.setattr(sys, "argv", ["gas-engine", "fly"])
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    assert stop.value.code == 2 and "'fly'" in capsys.readouterr().err


def test_own_model_as_in_the_readme(tmp_path):
    """A callable, a schedule and a shape are enough."""
    from gas_engine import Denoiser, Schedule, rollout

    denoiser = Denoiser(lambda x, t, cond: -x * t.to(x.dtype), Schedule.flow(), "flow", shape=(4, 8, 8))
    solver = GeneralizedSolver(4, denoiser.schedule)
    rollout(denoiser, torch.randn(2, 4, 8, 8), solver.tableau("flow")).abs().mean().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in solver.parameters())
    save_solver(solver, tmp_path / "s.safetensors")
    assert load_solver(tmp_path / "s.safetensors").schedule == Schedule.flow()
