"""`gas-engine convert`: solvers out, and what cannot be said refused in a sentence."""

from __future__ import annotations

import json

import pytest
import torch
from test_export import SD, learned

from gas_engine import BELMSolver, GeneralizedSolver, Schedule, convert, load_solver, save_solver
from gas_engine.solvers.files import write_published, write_readable


def same(a, b):
    assert type(a) is type(b) and a.schedule == b.schedule and a.config() == b.config()
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


@pytest.fixture
def solver(tmp_path):
    path = tmp_path / "solver.safetensors"
    save_solver(learned(4), path, model="owner/model", guidance=7.5, metrics={"l1": 0.1})
    return path


def verb(*arguments):
    convert.main([str(a) for a in arguments])


@pytest.mark.parametrize(
    "original",
    [
        learned(5), learned(4, order=2), learned(1), learned(3, theory=False), learned(3, theory="linear"),
        learned(6, Schedule.flow(3.0)), learned(2, Schedule.vp_linear()), BELMSolver(4, SD),
    ],
)  # fmt: skip
def test_json_holds_everything_to_the_bit(original, tmp_path):
    save_solver(original, tmp_path / "a.safetensors", model="m", metrics={"l1": 0.1})
    verb(tmp_path / "a.safetensors", "--to", "json", "--out", tmp_path / "b.json")
    verb(tmp_path / "b.json", "--to", "safetensors", "--out", tmp_path / "c.safetensors")
    again = load_solver(tmp_path / "b.json", model="m")
    same(original, again)
    assert again.facts["metrics"] == {"l1": 0.1}
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
    shown = json.loads((tmp_path / "b.json").read_text())["follows from the parameters"]
    tableau = original.tableau("data")
    assert shown["times"] == original.times().tolist() and shown["told_times"] == tableau.t_net.tolist()
    assert [row[-1] for row in shown["B"]] == tableau.B.detach().diagonal().tolist()


def test_damaged_json_is_one_sentence(tmp_path):
    write_readable(learned(3), tmp_path / "good.json")
    good = json.loads((tmp_path / "good.json").read_text())
    damage = {
        "numbers do not match its checksum": {**good, "parameters": {**good["parameters"], "theta": [0.0, 0.0]}},
        "holds no parameters": {"format": good["format"]},
        "are no numbers": {**good, "parameters": {"theta": ["a"]}},
        "not a solver of this package": {**good, "format": "other"},
    }
    for said, content in damage.items():
        (tmp_path / "bad.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=said):
            load_solver(tmp_path / "bad.json")
    for text in ("", "{", "[]", "\x00"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="cannot read the solver"):
            load_solver(tmp_path / "bad.json")


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_the_published_format_and_back_to_the_bit(steps, tmp_path):
    original = learned(steps)
    save_solver(original, tmp_path / "solver.safetensors")
    verb(tmp_path / "solver.safetensors", "--to", "published", "--out", tmp_path / "student.pt")
    content = torch.load(tmp_path / "student.pt", weights_only=True)
    assert set(content) == {"ema", "model", "optim", "step"}
    rows = content["ema"]["shadow_params"]
    assert [tuple(row.shape) for row in rows] == [(steps - 1,), *[(steps,)] * (2 * steps + 1)]
    assert torch.equal(rows[2], original.phi_c.detach()[:, 0]) and torch.equal(rows[3], original.phi_a.detach()[:, 0])
    same(original, load_solver(tmp_path / "student.pt", SD, 1e-3))
    verb(tmp_path / "student.pt", "--model", "sd15", "--to", "json", "--out", tmp_path / "again.json")
    again = load_solver(tmp_path / "again.json")
    torch.testing.assert_close(again.tableau("noise").B, original.tableau("noise").B, rtol=1e-9, atol=0)
    assert again.facts["model"] == "sd15"


@pytest.mark.parametrize(
    "other", [learned(4, order=2), learned(3, theory="linear"), learned(3, base="ipndm"), BELMSolver(3, SD)]
)
def test_what_the_published_format_cannot_say(other, tmp_path):
    with pytest.raises(ValueError, match="with theory and of full order only, not this one"):
        write_published(other, tmp_path / "student.pt")
    assert not (tmp_path / "student.pt").exists()


def test_a_published_student_needs_its_schedule(tmp_path, capsys):
    flow = GeneralizedSolver(3, Schedule.flow(3.0), t_eps=1e-2)
    write_published(flow, tmp_path / "student.pt")
    with pytest.raises(SystemExit, match="2"):
        verb(tmp_path / "student.pt", "--to", "json", "--out", tmp_path / "s.json")
    assert "give --model, or --schedule and --t-eps" in capsys.readouterr().err
    times = ("--t-eps", "0.01")
    verb(tmp_path / "student.pt", "--schedule", "flow:3", *times, "--to", "json", "--out", tmp_path / "s.json")
    same(flow, load_solver(tmp_path / "s.json"))
    verb(tmp_path / "student.pt", "--schedule", tmp_path / "s.json", *times, "--out", tmp_path / "s.safetensors")
    same(flow, load_solver(tmp_path / "s.safetensors"))
    with pytest.raises(SystemExit, match="2"):
        verb(tmp_path / "student.pt", "--schedule", "cosine", "--out", tmp_path / "x.safetensors")
    assert "--schedule must be flow:SHIFT" in capsys.readouterr().err


def test_a_scheduler_directory_of_several_solvers(solver, tmp_path, capsys):
    pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
    from gas_engine.export import GASScheduler, for_diffusers

    save_solver(learned(6), tmp_path / "k6.safetensors")
    with pytest.raises(SystemExit, match="2"):
        verb(solver, tmp_path / "k6.safetensors", "--to", "diffusers", "--out", tmp_path / "scheduler")
    assert "does not say what the network predicts; give --model" in capsys.readouterr().err
    for how in (("--model", "sd15"), ("--prediction", "noise")):
        verb(solver, tmp_path / "k6.safetensors", *how, "--to", "diffusers", "--out", tmp_path / "scheduler")
        found = GASScheduler.from_pretrained(tmp_path / "scheduler")
        assert dict(found.config)["solvers"] == for_diffusers([learned(4), learned(6)], "noise")["solvers"]
    assert {path.name for path in (tmp_path / "scheduler").iterdir()} == {"gas_scheduler.py", "scheduler_config.json"}


def test_third_party_files_and_wrong_questions(solver, tmp_path, capsys):
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "model.ckpt")
    verb(tmp_path / "model.ckpt", "--to", "safetensors", "--out", tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "model.json").exists()
    wrong = {
        "such files convert one by one with --to safetensors": (tmp_path / "model.ckpt", "--to", "json"),
        "there is no solver file": (tmp_path / "absent.safetensors", "--to", "json"),
        "--to json writes one solver, got 2": (solver, solver, "--to", "json"),
        "--to hub takes one run directory": (solver, "--to", "hub"),
        "give at least one file": ("--to", "json"),
    }
    for said, arguments in wrong.items():
        with pytest.raises(SystemExit, match="2"):
            verb(*arguments, "--out", tmp_path / "out")
        assert said in capsys.readouterr().err.replace("\n", " "), said


def test_a_prediction_that_the_file_denies(tmp_path, capsys):
    save_solver(learned(4), tmp_path / "k4.safetensors", prediction="noise")
    with pytest.raises(SystemExit, match="2"):
        verb(tmp_path / "k4.safetensors", "--to", "diffusers", "--prediction", "flow", "--out", tmp_path / "scheduler")
    assert "--prediction flow was given, but a file says noise" in capsys.readouterr().err
