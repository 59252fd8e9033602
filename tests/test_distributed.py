"""Two processes against one: gradients, losses, files, resuming, weights in parts, and a rank that is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from twin import relative

from gas_engine import load_solver, teacher, train
from gas_engine._cli import InputError
from gas_engine.distributed import ALONE, Group
from gas_engine.training import setup

HERE = Path(__file__).parent
LIMIT = 240  # seconds for everything that two ranks do


def ports(count: int) -> list[str]:
    """Free ones, as far as one can know."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return found


def cut_after(out: Path, step: int) -> None:
    """As if killed before a later checkpoint."""
    for path in (out / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(directory, what each rank found, exit code and last words of the rank that survived the other)."""
    directory = tmp_path_factory.mktemp("ranks")
    where = os.getcwd()
    os.chdir(HERE)
    kept = setup.SELECTION_SEEDS, setup.HELD_OUT_SEEDS
    ranks.short_evaluation()
    meeting = ports(10)
    started = []
    try:
        train.main(ranks.options(directory, "one"))
        shutil.copytree(directory / "one", directory / "resumed-by-two")
        cut_after(directory / "resumed-by-two", 3)
        for rank in range(2):
            environment = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
            }  # fmt: skip
            started.append(
                subprocess.Popen(
                    [sys.executable, str(HERE / "ranks.py"), str(directory), *meeting], cwd=HERE, env=environment,
                    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                )
            )  # fmt: skip
        deadline = time.monotonic() + LIMIT
        while not list(directory.glob("killed/checkpoints/step-*")):
            for process in started:
                assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, "the ranks wait for each other"
            time.sleep(0.05)
        started[1].send_signal(signal.SIGKILL)
        _, words = started[0].communicate(timeout=60)
        found = [torch.load(directory / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]
        yield directory, found, (started[0].returncode, words)
    finally:
        for process in started:
            process.kill()
            process.wait()
        os.chdir(where)
        setup.SELECTION_SEEDS, setup.HELD_OUT_SEEDS = kept


@pytest.mark.parametrize("batch", [4, 5, 1])
def test_gradients_and_losses_do_not_depend_on_the_number_of_processes(pair, batch):
    """float64: the gradient of an update to 1e-12, losses of 20 to 1e-6; parameters the same bits on both ranks."""
    _, found, _ = pair
    wanted = ranks.twenty_updates(ALONE)[batch]
    first, second = (rank["updates"][batch] for rank in found)
    assert relative(first["gradient"], wanted["gradient"]) < 1e-12
    assert len(first["losses"]) == 20 and relative(first["losses"], wanted["losses"]) < 1e-6
    assert relative(first["solver"], wanted["solver"]) < 1e-9
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("fakes", ["fresh 5", "reuse 5", "fresh 1", "reuse 1"])
def test_adversarial_training_does_not_depend_on_the_number_of_processes(pair, fakes):
    """Solver, discriminator and what is read of them, in float64; the same bits on both ranks."""
    _, found, _ = pair
    wanted = ranks.adversarial(ALONE)[fakes]
    first, second = (rank["adversarial"][fakes] for rank in found)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert relative(first["solver"], wanted["solver"]) < 1e-10 and relative(first["critic"], wanted["critic"]) < 1e-10
    assert relative(first["read"], wanted["read"]) < 1e-6


def test_memory_that_runs_out_on_one_rank_is_saved_on_all(pair):
    _, found, _ = pair
    first, second = (rank["shortage"] for rank in found)
    assert first["notices"] == second["notices"] and len(first["notices"]) == 1
    assert "going on with micro-batch all, 1 graph(s), lean" in first["notices"][0]
    assert torch.equal(first["solver"], second["solver"])
    assert relative(first["solver"], ranks.shortage(ALONE, 1)["solver"]) < 1e-6


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all(pair):
    _, found, _ = pair
    assert [rank["skipped"]["skipped"] for rank in found] == [1, 1]
    assert torch.equal(found[0]["skipped"]["solver"], found[1]["skipped"]["solver"])
    assert relative(found[0]["skipped"]["solver"], ranks.skipped(ALONE, 0)["solver"]) < 1e-6


def test_gradients_of_a_discriminator(pair):
    """Sums over buckets of mixed dtypes; a rank with no rows brings no gradient and gets it."""
    _, found, _ = pair
    wanted = ranks.discriminator(ALONE)
    for rank in found:
        assert all(relative(a, b) < 1e-5 for a, b in zip(rank["discriminator"], wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*(rank["discriminator"] for rank in found), strict=True))


def test_evaluation_in_parts_gives_the_same_bits(pair):
    _, found, _ = pair
    wanted = ranks.evaluation(ALONE)
    for rank in found:
        for mine, whole in zip(rank["evaluation"], wanted, strict=True):
            assert (mine.solver, mine.setting, mine.l1, mine.rmse) == (
                whole.solver, whole.setting, whole.l1, whole.rmse
            )  # fmt: skip
            assert torch.equal(mine.samples, whole.samples)


def test_every_item_is_done_once_and_known_to_all(pair):
    _, found, _ = pair
    assert all(rank["map"] == [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)] for rank in found)
    assert all(rank["any"] == [True, False] for rank in found)


def test_ranks_that_differ_and_refusals_of_rank_0_stop_all(pair):
    _, found, _ = pair
    assert all("update 7: rank(s) 1 hold other numbers than rank 0" in rank["refusals"][0] for rank in found)
    assert [rank["refusals"][1] for rank in found] == ["ValueError('no')", "SystemExit(2)"]


def test_a_teacher_set_is_the_same_file_by_file(pair):
    directory, found, _ = pair
    teacher.main(ranks.teacher_options(directory, "set-of-one"))
    files = {path.name: path.read_bytes() for path in (directory / "set-of-one").iterdir()}
    assert len(files) == 4
    assert files == {path.name: path.read_bytes() for path in (directory / "set-of-two").iterdir()}
    assert [rank["verbs"]["teacher"][:3] for rank in found] == ["0: ", "0: "] and found[1]["verbs"]["teacher"] == "0: "


def test_a_run_of_two_is_the_run_of_one_and_rank_0_alone_writes(pair):
    directory, found, _ = pair
    one, two = (load_solver(directory / name / "solver.safetensors") for name in ("one", "two"))
    assert relative(ranks.flat(two), ranks.flat(one)) < 1e-6
    assert two.facts["metrics"]["l1"] == pytest.approx(one.facts["metrics"]["l1"], rel=1e-6)
    names = [
        sorted(str(p.relative_to(directory / name)) for p in (directory / name).rglob("*") if "events" not in p.name)
        for name in ("one", "two")
    ]
    assert names[0] == names[1] and len(list((directory / "two").glob("events.*"))) == 1
    rows = [json.loads(line)["step"] for line in (directory / "two" / "metrics.jsonl").read_text().splitlines()]
    assert rows == [2, 4, 6]
    assert "distance to the" in found[0]["verbs"]["train"] and found[1]["verbs"]["train"] == "0: "


def test_what_one_rank_learns_all_do(pair):
    """A signal to rank 1 alone: both stop after the same update, rank 0 with a checkpoint. NaN: both go back."""
    directory, found, _ = pair
    assert [rank["verbs"]["stopped"][:5] for rank in found] == ["143: ", "143: "]
    assert "stopped after update 4; go on with" in found[0]["verbs"]["stopped"]
    assert (directory / "stopped" / "checkpoints" / "step-000004").exists()
    assert [rank["verbs"]["not-finite"][:3] for rank in found] == ["0: ", "0: "]
    assert "back at update 3 with half the rate (1 of 3 times)" in found[0]["verbs"]["not-finite"]


def test_another_number_of_processes_may_resume(pair, monkeypatch):
    """One began, two went on; two began, one goes on."""
    directory, found, _ = pair
    assert "at update 3" in found[0]["verbs"]["resume"]
    cut_after(directory / "two", 3)
    monkeypatch.chdir(HERE)
    train.main(["--out", str(directory / "two"), "--resume", "--device", "cpu"])
    wanted = ranks.flat(load_solver(directory / "one" / "solver.safetensors"))
    for name in ("resumed-by-two", "two"):
        assert relative(ranks.flat(load_solver(directory / name / "solver.safetensors")), wanted) < 1e-6, name


@pytest.mark.parametrize(
    "name", ["perceptron plain", "perceptron lean", "perceptron blocks", "perceptron both", "unet both", "tied plain"]
)
def test_weights_in_parts_give_the_same_gradient(pair, name):
    """And each rank holds half of them, with a whole layer where two blocks share it."""
    _, found, _ = pair
    for rank in found:
        row = rank["sharded"][name]
        assert all(relative(gradient, row["wanted"]) < 1e-6 for gradient in row["found"])
        assert 0.45 < row["share"] < (0.65 if name == "tied plain" else 0.55)


def test_a_run_with_weights_in_parts(pair):
    directory, found, _ = pair
    assert [rank["verbs"]["shard"][0] for rank in found] == ["0", "0"]
    out = directory / "whole"
    more = ["--model", "toy:make_perceptron", "--batch", "4"]
    train.main(ranks.options(directory, "whole", *more, "--teacher-set", str(directory / "whole-set")))
    wanted, parts = (load_solver(path / "solver.safetensors") for path in (out, directory / "parts"))
    assert relative(ranks.flat(parts), ranks.flat(wanted)) < 1e-6
    sets = [sorted(p.read_bytes() for p in (directory / f"{name}-set").iterdir()) for name in ("whole", "parts")]
    assert sets[0] == sets[1]


def test_bad_input_is_refused_by_all(pair):
    _, found, _ = pair
    for rank in found:
        assert rank["verbs"]["odd"].startswith("2: ") and rank["verbs"]["odd"].strip().endswith("give --batch 6")
    assert "already holds a run" in found[0]["verbs"]["taken"] and found[1]["verbs"]["taken"] == "2: "


def test_a_killed_rank_ends_the_others_with_a_sentence(pair):
    """Within a minute, exit code 2; what rank 0 had written is whole, and one process goes on with it."""
    directory, _, (code, words) = pair
    assert code == 2 and "Traceback" not in words
    assert "gas-engine train: rank 0 of 2 stops, since another process ended or does not answer" in words
    out = directory / "killed"
    newest = max(int(path.name.removeprefix("step-")) for path in out.glob("checkpoints/step-*"))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "iterations": newest + 1}))
    train.main(["--out", str(out), "--resume", "--device", "cpu"])
    assert (out / "solver.safetensors").exists()


def test_variables_and_options_that_do_not_fit(monkeypatch, tmp_path, capsys):
    assert Group.from_environment() == ALONE
    with pytest.raises(SystemExit):
        train.main(ranks.options(tmp_path, "run", "--shard"))
    assert "--shard spreads the weights over processes, and there is one" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="RANK must be a number, as torchrun sets it, got None"):
        Group.from_environment()
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(InputError, match="got 'one'"):
        Group.from_environment()
    two = Group(1, 2, 1)
    assert (two.part(5), Group(0, 2).part(1), two.most(5)) == (slice(2, 5), slice(0, 0), 3)
    with pytest.raises(InputError, match="--device cuda:1 would be the same for 2 processes"):
        two.device("cuda:1")
