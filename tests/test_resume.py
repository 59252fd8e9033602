"""Exact resumption: of everything that has state, from whatever a crash left on the disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy
from runs import HERE, brief, checkpoints, flat_of, hidden, options, rows, toy_trainer
from twin import relative

import gas_engine
from gas_engine import Denoiser, load_solver, train
from gas_engine.training.adversary import Adversarial, Adversary
from gas_engine.training.directory import RunDirectory


def adversary(fakes="fresh"):
    torch.manual_seed(0)
    layers = [torch.nn.Flatten(), torch.nn.Linear(18, 8), torch.nn.LeakyReLU(), torch.nn.Linear(8, 1)]
    network = torch.nn.Sequential(*layers, torch.nn.Flatten(0))
    return Adversary(network, Adversarial(rate=1e-2, method="double_backward", fakes=fakes, warm_up=2))


def through_a_file(trainer, path):
    """The trainer's state, written and read again."""
    directory = RunDirectory(path)
    directory.save(trainer.step, *trainer.state())
    return directory.restore()


@pytest.mark.parametrize(("optimizer", "fakes"), [("adam", None), ("soap", None), ("soap", "fresh"), ("adam", "reuse")])
def test_state_goes_on_bit_for_bit(tmp_path, optimizer, fakes):
    """Of solver, average, optimiser, discriminator, its optimiser, its fakes, the nearest solver."""

    def new():
        return toy_trainer(optimizer=optimizer, rate_warm_up=3, adversary=adversary(fakes) if fakes else None)

    whole, first, second = new(), new(), new()
    for trainer, end in ((whole, 8), (first, 4)):
        while trainer.step < end:
            trainer.update()
            trainer.best.see(trainer.step, 1 / trainer.step, trainer.average)
    second.load(*through_a_file(first, tmp_path))
    while not second.finished:
        second.update()
        second.best.see(second.step, 1 / second.step, second.average)
    assert whole.state()[1] == second.state()[1]
    for key, value in whole.state()[0].items():
        assert torch.equal(value, second.state()[0][key]), key
    assert whole.state()[0].keys() == second.state()[0].keys()
    assert any(key.startswith("adversary.discriminator.") for key in whole.state()[0]) == bool(fakes)
    assert ("adversary.fake" in whole.state()[0]) == (fakes == "reuse")


def test_what_did_not_fit_is_not_tried_again(tmp_path):
    """A cheaper execution is state too, unless another one is asked for."""
    inner = toy.mixture()

    class Small(torch.nn.Module):
        def forward(self, x, t, cond):
            if torch.is_grad_enabled() and len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return inner(x, t, cond)

    first, second, asked = (toy_trainer(Denoiser(Small(), inner.schedule, "data", toy.SHAPE)) for _ in range(3))
    first.update()
    second.load(*through_a_file(first, tmp_path))
    assert str(second.execution) == str(first.execution) == "micro-batch 2, 1 graph(s), lean" and not second.notices
    asked._asked = "micro-batch 3, 1 graph(s)"
    asked.load(*through_a_file(first, tmp_path))
    assert str(asked.execution) == "micro-batch all, 1 graph(s)"


def test_a_budget_that_was_too_large_gives_way_to_cheaper_plans(small, no_pictures, tmp_path, monkeypatch, capsys):
    """The solver, to rounding, of a device with room; a resumed run begins with the plan that fitted."""
    room, refused = [4], []

    class Tight(toy.Perceptron):
        def forward(self, x, t, cond=None):
            if torch.is_grad_enabled() and len(x) > room[0]:
                refused.append(len(x))
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x, t, cond)

    def make_tight():
        torch.manual_seed(0)
        return Denoiser(Tight(), toy.mixture().schedule, "data", toy.SHAPE, name="tight")

    monkeypatch.setattr(toy, "make_tight", make_tight, raising=False)
    short = ["--model", "toy:make_tight", "--steps", "3", "--iterations", "6", "--save-every", "3"]
    wide, tight = tmp_path / "wide", tmp_path / "tight"
    for most, out in ((4, wide), (2, tight)):
        room[:] = [most]
        capsys.readouterr()
        train.main(brief(out, *short, "--memory-budget", "1GiB"))
        said = capsys.readouterr().out
        assert "plan      micro-batch 4, all graph(s), lean" in said and bool(refused) == (out == tight)
    notices = [line for line in said.splitlines() if "out of memory" in line]
    assert notices[0].startswith("update 0: out of memory with micro-batch 4, all graph(s), lean; going on with ")
    assert len(notices) == len(refused) and "going on with micro-batch 2" in notices[-1]
    whole, tightly = (load_solver(out / "solver.safetensors") for out in (wide, tight))
    assert relative(flat_of(tightly), flat_of(whole)) < 1e-6
    # As if stopped after update 3.
    shutil.rmtree(tight / "checkpoints" / "step-000006")
    train.main(["--out", str(tight), "--resume", "--device", "cpu", "--evaluation", "student"])
    said = capsys.readouterr().out
    assert "at update 3" in said and "out of memory" not in said and len(notices) == len(refused)
    assert torch.equal(flat_of(load_solver(tight / "solver.safetensors")), flat_of(tightly))


def test_run_directory_is_complete_and_resume_is_exact(small, tmp_path):
    """A run that is stopped at a checkpoint and resumed ends with the very bytes of one that was not."""
    every = ["--save-every", "3", "--sample-every", "6", "--log-every", "2"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train.main(options(whole, "--iterations", "6", *every))
    train.main(options(resumed, "--iterations", "6", *every))
    # As if killed after update 4: its last checkpoint is that of update 3.
    for path in (resumed / "checkpoints").glob("step-000006/*"):
        path.unlink()
    (resumed / "checkpoints" / "step-000006").rmdir()
    train.main(["--out", str(resumed), "--resume", "--device", "cpu"])
    for name in ("checkpoints/step-000006/state.safetensors", "solver.safetensors", "comparison.csv"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name
    assert [row["step"] for row in rows(resumed)] == [2, 4, 6]
    names = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    assert {
        "config.json", "metrics.jsonl", "best.safetensors", "solver.safetensors", "comparison.md",
        "comparison.png", "schedule.png", "tableau.png", "samples/step-000006.png",
        "checkpoints/step-000006/manifest.json",
    } <= names  # fmt: skip
    assert any(name.startswith("events.") for name in names)
    assert not any(".tmp" in name for name in names)
    solver = load_solver(whole / "solver.safetensors", model="mixture")
    assert solver.steps == 2 and set(solver.facts["metrics"]) >= {"l1", "rmse", "psnr"}
    table = (whole / "comparison.md").read_text()
    assert all(name in table for name in ("learned", "DDIM", "Heun", "UniPC", "iPNDM", "DEIS", "DPM-Solver++(3M)"))


@pytest.mark.parametrize("make", ["make", "make_drawing"])
def test_how_often_a_run_looks_at_itself_never_changes_training(small, no_pictures, tmp_path, monkeypatch, make):
    """The very bytes of the solver, whatever is logged, drawn or measured; also if the network itself draws."""

    def make_drawing():
        inner = toy.mixture()
        return Denoiser(
            lambda x, t, cond: inner(x, t, cond) + 0.01 * torch.randn(x.shape), inner.schedule, "data", toy.SHAPE,
            network=inner, name="drawing",
        )  # fmt: skip

    monkeypatch.setattr(toy, "make_drawing", make_drawing, raising=False)
    short = ["--model", f"toy:{make}", "--iterations", "7", "--save-every", "7"]
    found = []
    for evaluate, sample, log in ((0, 100, 100), (1, 2, 1), (3, 1, 2)):
        out = tmp_path / f"{evaluate}-{sample}-{log}"
        every = ["--evaluate-every", str(evaluate), "--sample-every", str(sample), "--log-every", str(log)]
        train.main(brief(out, *short, *every))
        found.append(out)
        measured = [row["step"] for row in rows(out) if "distance" in row]
        assert measured == {0: [], 1: [*range(1, 8)], 3: [3, 6, 7]}[evaluate]
    solvers = [load_solver(out / "solver.safetensors") for out in found]
    assert all(torch.equal(flat_of(solver), flat_of(solvers[0])) for solver in solvers)
    if make == "make":
        assert len({(out / "solver.safetensors").read_bytes() for out in found}) == 1


def truncate(checkpoint):
    state = checkpoint / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-9])


def flip(checkpoint):
    state = checkpoint / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)


def cut_manifest(checkpoint):
    (checkpoint / "manifest.json").write_text('{"step": 6, "sha')


@pytest.mark.parametrize("damage", [truncate, flip, cut_manifest])
def test_damaged_checkpoint_falls_back_to_the_one_before(small, no_pictures, tmp_path, capsys, damage):
    out, whole = tmp_path / "run", tmp_path / "whole"
    train.main(brief(whole, "--iterations", "6", "--save-every", "2"))
    train.main(brief(out, "--iterations", "6", "--save-every", "2"))
    damage(out / "checkpoints" / "step-000006")
    capsys.readouterr()
    train.main(["--out", str(out), "--resume", "--device", "cpu", "--evaluation", "student"])
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("damaged: step-000006"))
    assert line.endswith("going on from step-000004") and "at update 4" in said
    assert (out / "solver.safetensors").read_bytes() == (whole / "solver.safetensors").read_bytes()
    assert [row["step"] for row in rows(out)] == [6] and not hidden(out)


def test_resume_auto_begins_goes_on_and_begins_again(small, no_pictures, tmp_path, capsys):
    """One command line for all starts; without auto, a run whose checkpoints are all damaged is not begun again."""
    out = tmp_path / "run"
    line = brief(out, "--iterations", "4", "--save-every", "2", "--resume", "auto")
    train.main(line)
    first = (out / "solver.safetensors").read_bytes()
    assert "resuming" not in capsys.readouterr().out
    train.main(line)
    assert "at update 4" in capsys.readouterr().out
    for checkpoint in (out / "checkpoints").iterdir():
        flip(checkpoint)
    with pytest.raises(SystemExit) as stop:
        train.main(["--out", str(out), "--device", "cpu", "--resume"])
    assert stop.value.code == 2 and "begin again with --resume auto" in capsys.readouterr().err
    (out / "solver.safetensors").unlink()
    train.main(line)
    assert "at update 0" in capsys.readouterr().out
    assert (out / "solver.safetensors").read_bytes() == first


def test_the_newest_and_the_nearest_checkpoints_are_kept(tmp_path):
    """Of those at multiples of save_every; one that a signal asked for goes when the next is written."""
    directory, state = RunDirectory(tmp_path), ({"x": torch.zeros(1)}, {})
    for step, distance in ((0, None), (2, 0.5), (4, 0.1), (6, 0.3), (8, None)):
        directory.save(step, *state, keep=2, every=2, distance=distance)
    assert checkpoints(tmp_path) == [4, 6, 8]
    directory.save(9, *state, keep=2, every=2)
    assert checkpoints(tmp_path) == [4, 6, 8, 9]
    directory.save(10, *state, keep=2, every=2, distance=0.05)
    assert checkpoints(tmp_path) == [8, 10]
    assert directory.restore(before=10, every=2)[0] == 8 and not hidden(tmp_path)
    directory = RunDirectory(tmp_path / "unmeasured")
    for step in range(5):
        directory.save(step, *state, keep=2)
    assert checkpoints(directory.path) == [3, 4]


def test_what_is_renamed_is_on_the_disk(tmp_path, monkeypatch):
    """The file before it gets its name, and the directory afterwards."""
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1])
    RunDirectory(tmp_path).save(7, {"x": torch.zeros(1)}, {})
    names = [os.path.relpath(path, tmp_path / "checkpoints") for path in synced]
    assert names[0] == ".step-000007/state.safetensors" and names[-1] == "." and ".step-000007" in names


def test_writing_a_checkpoint_may_end_anywhere(tmp_path, monkeypatch):
    """An exception at each call that syncs, renames or removes: a whole checkpoint is left, and the next save works."""

    class Ended(BaseException):
        pass

    trainer = toy_trainer()
    trainer.update()
    ends = 0
    for call in range(1, 40):
        directory = RunDirectory(tmp_path / str(call))
        directory.save(0, *trainer.state())
        directory.save(1, *trainer.state())
        with monkeypatch.context() as patch:
            left = [call]
            for name in ("fsync", "rename", "replace", "rmdir", "unlink"):
                real = getattr(os, name)

                def deadly(*args, real=real, left=left, **kwargs):
                    left[0] -= 1
                    if left[0] == 0:
                        raise Ended
                    return real(*args, **kwargs)

                patch.setattr(os, name, deadly)
            try:
                directory.save(1, *trainer.state(), keep=2)  # over one of the same step
                directory.save(2, *trainer.state(), keep=2)
            except Ended:
                ends += 1
        step, tensors, _ = directory.restore()
        assert step in (0, 1, 2) and torch.equal(tensors["solver.theta"], trainer.solver.theta)
        directory.save(3, *trainer.state(), keep=2)
        directory.forget_after(3)
        assert directory.restore()[0] == 3 and not hidden(directory.path)
    assert 8 < ends < 39  # beyond the last call nothing ends


def test_killed_runs_end_with_the_same_bytes(tmp_path):
    """SIGKILL at random moments (GAS_ENGINE_KILLS of them), resumed each time: the files of the undisturbed run."""
    kills, seed = os.environ.get("GAS_ENGINE_KILLS", "4"), os.environ.get("GAS_ENGINE_SEED", "0")
    source = Path(gas_engine.__file__).parents[1]  # what is tested here is tested there
    done = subprocess.run(
        [sys.executable, "killed.py", str(tmp_path), kills, seed], cwd=HERE, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(source)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    died = [line for line in json.loads(done.stdout)["kills"] if ": killed at" in line]
    assert len(died) >= int(kills) - 1, died  # a process may have ended before the call at which it was to die
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for name in ("solver.safetensors", "best.safetensors", "comparison.csv", "checkpoints/step-000060/manifest.json"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), (name, died)
    assert [row["step"] for row in rows(whole)] == [row["step"] for row in rows(killed)]
    assert checkpoints(whole) == checkpoints(killed) and not hidden(killed)
