"""What happens to long runs: numbers that are not finite, signals, a disk that is full. Faults are really injected."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess

import pytest
import torch
import toy
from runs import brief, checkpoints, flat, hidden, options, rows, toy_trainer

from gas_engine import Denoiser, load_solver, train
from gas_engine.execution import Execution
from gas_engine.losses import distillation_loss
from gas_engine.training.adversary import Adversarial, Adversary
from gas_engine.training.batches import Batches
from gas_engine.training.directory import RunDirectory
from gas_engine.training.loop import resume
from gas_engine.training.loop import train as loop
from gas_engine.training.trainer import NotFinite, Trainer


@pytest.fixture
def at_update(monkeypatch):
    """``at_update(n, act)``: call ``act`` when an update begins that n were done before."""
    acts, real = {}, Batches.at

    def batch(batches, step):
        acts.pop(step, lambda: None)()
        return real(batches, step)

    monkeypatch.setattr(Batches, "at", batch)
    return acts.__setitem__


# Not finite


def test_a_best_solver_of_updates_that_are_taken_back_goes(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.best.write_bytes(b"of an update that is no more")
    resume(toy_trainer(), directory, train.Config(), None)
    assert not directory.best.exists()
    resume(toy_trainer(), directory, train.Config(), None)  # nor does it have to be there


def test_updates_that_are_not_finite_change_nothing_and_stop_after_patience():
    trainer = toy_trainer(toy.make_late_nan(), iterations=100)
    before = flat(trainer.solver)
    with pytest.raises(NotFinite, match=r"20 updates in a row .* lower --rate"):
        for _ in trainer:
            assert torch.equal(flat(trainer.solver), before)
    assert trainer.skipped == 20 and bool(torch.isfinite(flat(trainer.solver)).all())


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_single_bad_update_is_skipped(value, micro_batch):
    """Whole, whichever of its samples was bad, and though the gradient of |x| is finite at infinity."""
    trainer, plain = toy_trainer(iterations=6, execution=Execution(micro_batch=micro_batch)), distillation_loss("l1")
    bad = torch.tensor([False, True, False, False])[:, None, None, None]
    trainer.loss = lambda x, y, rows: plain(torch.where(bad[: len(x)] & (trainer.step == 2), x + value, x), y, rows)
    kept = []
    for _ in trainer:
        kept.append((flat(trainer.solver), flat(trainer.average), trainer.state()[1]["skipped_in_a_row"]))
    assert [skipped for _, _, skipped in kept] == [0, 0, 1, 0, 0, 0] and trainer.skipped == 1
    for part in (0, 1):
        same = [torch.equal(kept[n][part], kept[n + 1][part]) for n in range(5)]
        assert same == [False, True, False, False, False] and bool(torch.isfinite(kept[-1][part]).all())


def test_the_discriminator_s_step_stays_where_the_solver_s_is_skipped():
    """It goes first, and is whole by then; and a discriminator that is not finite does not step itself."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(18, 1), torch.nn.Flatten(0))
    settings = Adversarial(rate=1e-2, method="double_backward")
    trainer = toy_trainer(iterations=4, adversary=Adversary(network, settings))
    bad, loss, draw = [1], trainer.loss, trainer.samples
    trainer.loss = lambda x, y, rows: loss(x, y, rows) * (torch.nan if trainer.step in bad else 1.0)
    trainer.samples = lambda *args: draw(*args) * (torch.nan if trainer.step == 3 else 1.0)
    kept = []
    for _ in trainer:
        kept.append((flat(trainer.solver), network[1].weight.detach().clone()))
    assert [torch.equal(kept[n][0], kept[n + 1][0]) for n in range(3)] == [True, False, False]
    assert [torch.equal(kept[n][1], kept[n + 1][1]) for n in range(3)] == [False, False, True]
    assert trainer.skipped == 1 and bool(torch.isfinite(network[1].weight).all())


def test_skipped_updates_are_announced_and_the_student_alone_is_measured(
    small, no_pictures, tmp_path, capsys, monkeypatch
):
    calls = []

    def loss(x, y, rows):
        calls.append(1)
        return (x - y).abs().flatten(1).mean(1) * (torch.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr("gas_engine.training.setup.distillation_loss", lambda *_, **__: loss)
    train.main(options(tmp_path / "run", "--iterations", "5", "--evaluation", "student"))
    assert "update 3: loss or gradient not finite, skipped (1 so far)" in capsys.readouterr().out
    assert len((tmp_path / "run" / "comparison.csv").read_text().splitlines()) == 2


@pytest.fixture
def sick(monkeypatch):
    """``sick(first, last)``: a model, ``toy:make_sick``, whose network is nan in these calls that want a gradient."""

    def make(first, last):
        calls = [0]

        def make_sick():
            inner = toy.mixture()

            def network(x, t, cond):
                if x.requires_grad or t.requires_grad:
                    calls[0] += 1
                    if first <= calls[0] <= last:
                        return inner(x, t, cond) * torch.nan
                return inner(x, t, cond)

            return Denoiser(network, inner.schedule, "data", toy.SHAPE, network=inner, name="sick")

        monkeypatch.setattr(toy, "make_sick", make_sick, raising=False)
        return ["--model", "toy:make_sick", "--steps", "1", "--max-skipped", "3"]

    return make


def test_a_network_that_is_nan_for_a_while_sends_the_run_back_with_half_the_rate(
    small, no_pictures, tmp_path, capsys, sick
):
    """Nan in calls 7 to 10, one an update: three are skipped, the run goes back to update 4, skips one, and goes on."""
    out = tmp_path / "run"
    more = ["--iterations", "12", "--save-every", "2", "--log-every", "1", "--rate-schedule", "constant"]
    train.main(brief(out, *sick(7, 10), *more, "--evaluate-every", "3"))
    said = capsys.readouterr().out
    assert "update 7 and what followed were not finite: back at update 4 with half the rate (1 of 3 times)" in said
    found = rows(out)
    assert [row["step"] for row in found] == [*range(1, 13)]
    assert [row["rate"] for row in found] == [0.01] * 4 + [0.005] * 8
    assert [row["loss"] is None for row in found] == [n == 5 for n in range(1, 13)]
    assert found[-1]["skipped"] == 4 and found[-1]["rollbacks"] == 1
    assert bool(torch.isfinite(flat(load_solver(out / "solver.safetensors"))).all())


@pytest.mark.parametrize(("times", "keep", "gone_back"), [(3, 5, 3), (3, 3, 2), (1, 3, 1), (0, 3, 0)])
def test_a_network_that_stays_nan_stops_the_run(small, no_pictures, tmp_path, capsys, sick, times, keep, gone_back):
    """Back by one checkpoint after the other, since none is of use, to the oldest; a sentence says what to try."""
    more = ["--iterations", "30", "--save-every", "2", "--max-rollbacks", str(times), "--keep", str(keep)]
    with pytest.raises(SystemExit) as stop:
        train.main(brief(tmp_path / "run", *sick(7, 10**9), *more))
    said, error = capsys.readouterr()
    assert stop.value.code == 2 and said.count("with half the rate") == gone_back
    assert error.startswith("gas-engine train: 3 updates in a row had a loss or gradient that is not finite")
    assert f"after going back {gone_back} times" in error and "try a lower --rate than 0.01" in error
    assert not hidden(tmp_path / "run")


def test_a_run_that_went_back_resumes_with_its_lower_rate(small, no_pictures, tmp_path, at_update, monkeypatch):
    """A fault of the full rate alone; stopped before it or after going back, and resumed: the undisturbed bytes."""
    current, real = [], Trainer.__init__

    def remember(trainer, *args, **kwargs):
        real(trainer, *args, **kwargs)
        current[:] = [trainer]

    def loss(x, y, rows):
        bad = current[0].rollbacks == 0 and current[0].step >= 6
        return distillation_loss("l1")(x, y) * (torch.nan if bad else 1.0)

    monkeypatch.setattr(Trainer, "__init__", remember)
    monkeypatch.setattr("gas_engine.training.setup.distillation_loss", lambda *_, **__: loss)
    more = ["--iterations", "12", "--save-every", "2", "--max-skipped", "3"]
    train.main(brief(tmp_path / "whole", *more))
    for stop_at, gone_back in ((5, 0), (9, 1)):
        out = tmp_path / f"stopped-{stop_at}"
        at_update(stop_at, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            train.main(brief(out, *more))
        assert current[0].step == stop_at + 1 and current[0].rollbacks == gone_back
        train.main(["--out", str(out), "--resume", "--device", "cpu", "--evaluation", "student"])
        assert current[0].rollbacks == 1
        assert (out / "solver.safetensors").read_bytes() == (tmp_path / "whole" / "solver.safetensors").read_bytes()


# Signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_its_update_with_a_checkpoint(
    small, no_pictures, tmp_path, capsys, at_update, number, code
):
    more = ["--iterations", "8", "--save-every", "100"]
    train.main(brief(tmp_path / "whole", *more))
    out, before = tmp_path / "run", signal.getsignal(number)
    at_update(4, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stop:
        train.main(brief(out, *more))
    assert stop.value.code == code and checkpoints(out) == [0, 5] and signal.getsignal(number) is before
    assert f"{number.name}: stopped after update 5; go on with --out {out} --resume" in capsys.readouterr().out
    train.main(["--out", str(out), "--resume", "--device", "cpu", "--evaluation", "student"])
    assert (out / "solver.safetensors").read_bytes() == (tmp_path / "whole" / "solver.safetensors").read_bytes()


def test_a_second_interrupt_does_not_wait(small, no_pictures, tmp_path, capsys, at_update):
    at_update(2, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(SystemExit) as stop:
        train.main(brief(tmp_path / "run", "--iterations", "8"))
    assert stop.value.code == 130 and "interrupted" in capsys.readouterr().err


# A disk that is full


@pytest.fixture
def limit():
    """Files larger than so many bytes cannot be written: the kernel refuses, as it does when a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield set_limit
    set_limit(None)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one mebibyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root: run as root, or under `unshare -rm`")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


LATER = ["--iterations", "12", "--save-every", "2", "--log-every", "2", "--evaluate-every", "2"]


def check_that_it_went_on(out, whole, said):
    assert said.count("checkpoints could not be written") == 1 and "the run goes on, and tries again" in said
    assert (out / "solver.safetensors").read_bytes() == (whole / "solver.safetensors").read_bytes()
    assert checkpoints(out)[-2:] == [10, 12] and not hidden(out)
    assert [row["step"] for row in rows(out)][:1] + [row["step"] for row in rows(out)][-1:] == [2, 12]


def test_a_run_outlives_writes_that_fail(small, no_pictures, tmp_path, capsys, at_update, limit):
    whole, out = tmp_path / "whole", tmp_path / "run"
    train.main(brief(whole, *LATER))
    capsys.readouterr()
    held = []
    at_update(3, lambda: limit(40))
    at_update(8, lambda: (held.append(checkpoints(out)), limit(None)))
    train.main(brief(out, *LATER))
    said = capsys.readouterr().out
    check_that_it_went_on(out, whole, said)
    assert held == [[0, 2]] and "metrics could not be written" in said
    assert {row["step"] for row in rows(out)} <= {2, 4, 6, 8, 10, 12}


def test_a_run_outlives_a_full_disk(small, no_pictures, tmp_path, capsys, at_update, small_disk):
    """All loggers on; the disk has room again after a while."""
    whole, out = tmp_path / "whole", small_disk / "run"
    train.main(brief(whole, *LATER))

    def fill():
        with open(small_disk / "filler", "wb", buffering=0) as file:
            try:
                while file.write(bytes(256)) == 256:
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC

    at_update(3, fill)
    at_update(8, (small_disk / "filler").unlink)
    teacher = ["--teacher-set", str(tmp_path / "teacher"), "--logger", "tensorboard"]
    capsys.readouterr()
    train.main(brief(out, *LATER, *teacher))
    said = capsys.readouterr().out
    check_that_it_went_on(out, whole, said)
    assert "No space left on device" in said


def test_a_last_checkpoint_that_cannot_be_written_is_an_error_and_the_run_can_be_finished(
    small, no_pictures, tmp_path, capsys, at_update, limit
):
    whole, out = tmp_path / "whole", tmp_path / "run"
    train.main(brief(whole, *LATER))
    at_update(11, lambda: limit(40))
    with pytest.raises(SystemExit) as stop:
        train.main(brief(out, *LATER))
    limit(None)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "the last checkpoint could not be written" in error
    assert error.endswith(f"make room and go on with --out {out} --resume")
    assert checkpoints(out) == [6, 8, 10] and not (out / "solver.safetensors").exists() and not hidden(out)
    train.main(["--out", str(out), "--resume", "--device", "cpu", "--evaluation", "student"])
    assert (out / "solver.safetensors").read_bytes() == (whole / "solver.safetensors").read_bytes()


def test_a_solver_that_cannot_be_written_is_an_error_and_the_run_can_be_finished(
    small, no_pictures, tmp_path, capsys, monkeypatch, limit
):
    whole, out = tmp_path / "whole", tmp_path / "run"
    train.main(brief(whole, *LATER))

    with monkeypatch.context() as patch:
        patch.setattr(train, "train", lambda *args: (loop(*args), limit(40)))
        with pytest.raises(SystemExit) as stop:
            train.main(brief(out, *LATER))
    limit(None)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and f"make room and finish with --out {out} --resume" in error
    assert not (out / "solver.safetensors").exists() and not hidden(out)
    train.main(["--out", str(out), "--resume", "--device", "cpu", "--evaluation", "student"])
    assert (out / "solver.safetensors").read_bytes() == (whole / "solver.safetensors").read_bytes()
