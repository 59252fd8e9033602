"""``train --adversarial`` as a command: tables, pictures, resumption, where it begins, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gas_engine import load_solver, train


def options(out: Path, *more: str) -> list[str]:
    words = ["--out", str(out), "--teacher-set", str(out.parent / "set"), "--train-seeds", "0-15", "--steps", "2"]
    return [*words, "--batch", "4", "--device", "cpu", "--evaluation", "student", "--iterations", "4", *more]


def test_a_run_writes_its_table_and_resumes(small, tmp_path, capsys):
    """GS, then GAS beside it: distances and Frechet distances of both and of the teacher; resumed, the same solver."""
    train.main(options(tmp_path / "gs"))
    gas = ("--adversarial", "--compare", str(tmp_path / "gs" / "solver.safetensors"), "--log-every", "2")
    train.main(options(tmp_path / "gas", *gas, "--fakes", "reuse"))
    lines = (tmp_path / "gas" / "comparison.csv").read_text().splitlines()
    assert lines[0] == "solver,setting,l1,rmse,psnr,fd_data,fd_teacher"
    assert [line.partition(",")[0] for line in lines[1:]] == ["learned (gas)", "gs", "teacher"]
    assert all(float(line.split(",")[-2]) > 0 for line in lines[1:])
    rows = [json.loads(line) for line in (tmp_path / "gas" / "metrics.jsonl").read_text().splitlines()]
    assert {"adversarial", "d_loss", "d_gap", "r1", "r2"} <= {*rows[-1]}
    for picture in ("history.png", "comparison.png", "samples/step-000004.png"):
        assert (tmp_path / "gas" / picture).stat().st_size > 5_000

    train.main(options(tmp_path / "half", *gas, "--fakes", "reuse", "--save-every", "2"))
    newest = tmp_path / "half" / "checkpoints" / "step-000004" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    train.main(["--out", str(tmp_path / "half"), "--resume", "--device", "cpu"])
    assert "at update 2" in capsys.readouterr().out
    first, second = (load_solver(tmp_path / name / "solver.safetensors") for name in ("gas", "half"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_run_begins_with_a_solver(small, tmp_path, capsys):
    train.main(options(tmp_path / "gs"))
    start = str(tmp_path / "gs" / "solver.safetensors")
    train.main(options(tmp_path / "on", "--start-from", start, "--rate", "1e-12"))
    first, second = (load_solver(tmp_path / name / "solver.safetensors") for name in ("gs", "on"))
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([*options(tmp_path / "other", "--start-from", start), "--steps", "3"])
    assert stop.value.code == 2 and "--start-from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "seen"),
    [
        (("--model", "toy:make"), "[2, 3, 3]"),
        (("--discriminator", "none.pkl"), "none.pkl"),
        (("--gamma", "-1"), "-1"),
        (("--rate", "nan"), "rate above 0"),
        (("--rate", "inf"), "rate above 0"),
        (("--discriminator-micro-batch", "0"), "micro_batch"),
    ],
)
def test_bad_input_is_one_sentence(small, tmp_path, capsys, monkeypatch, more, seen):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    with pytest.raises(SystemExit) as stop:
        train.main(options(tmp_path / "run", "--adversarial", *more))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and seen in message and "Traceback" not in message
    assert not (tmp_path / "run" / "solver.safetensors").exists()
