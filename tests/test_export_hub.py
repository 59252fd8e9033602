"""A run as a repository for the Hub: the card, its files, and the upload, without network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_export import SD, learned

from gas_engine import convert, load_solver, save_solver
from gas_engine.export import push_to_hub

ROWS = """solver,setting,l1,rmse,psnr,fd_data,fd_teacher
learned (gs),"2000 updates, a|b",0.0123,0.02,40.0,,
UniPC,"unipc3-bh1, logSNR, 0.001",0.0456,0.07,29.1,,
"""


@pytest.fixture
def run(tmp_path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    facts = {"model": "owner/model-1.5", "guidance": 7.5, "loss": "l1", "prediction": "noise", "version": "0.1.0"}
    save_solver(learned(4), path / "solver.safetensors", **facts)
    (path / "comparison.csv").write_text(ROWS)
    (path / "schedule.png").write_bytes(b"a picture")
    teacher = {"solver": "ipndm2", "steps": 5}
    (path / "config.json").write_text(json.dumps({"model": "owner/model-1.5", "teacher": teacher, "prompts": "c.txt"}))
    return path


def test_the_directory(run, tmp_path):
    convert.main([str(run), "--to", "hub", "--out", str(tmp_path / "hub")])
    hub = tmp_path / "hub"
    files = {str(path.relative_to(hub)) for path in hub.rglob("*") if path.is_file()}
    assert files == {
        "README.md", "solver.safetensors", "solver.json", "schedule.png", "scheduler/scheduler_config.json",
        "scheduler/gas_scheduler.py", "comfyui/gas_solver/__init__.py", "comfyui/gas_solver/k_diffusion.py",
        "comfyui/gas_solver/solvers.json",
    }  # fmt: skip
    for name in ("solver.safetensors", "solver.json"):
        again = load_solver(hub / name, SD, model="owner/model-1.5")
        assert torch.equal(again.phi_c, learned(4).phi_c) and again.facts["guidance"] == 7.5
    assert (hub / "solver.safetensors").read_bytes() == (run / "solver.safetensors").read_bytes()


def test_the_card_says_the_real_numbers(run, tmp_path):
    convert.main([str(run), "--to", "hub", "--out", str(tmp_path / "hub")])
    card = (tmp_path / "hub" / "README.md").read_text()
    for said in (
        "# 4-step solver for owner/model-1.5",
        "39 learned numbers",
        "| learned (gs) | 2000 updates, a\\|b | 0.0123 | 0.02 | 40.0 |",
        "| UniPC | unipc3-bh1, logSNR, 0.001 | 0.0456 |",
        "The teacher is ipndm2 with 5 evaluations",
        "num_inference_steps=4, guidance_scale=7.5",
        "--guidance 7.5 --prompts",
        'DiffusionPipeline.from_pretrained("owner/model-1.5")',
        "](schedule.png)",
        f"| {float(learned(4).times()[1]):.6f} | {float(learned(4).told_times()[1]):.6f} |",
    ):
        assert said in card, said
    assert "FD" not in card and "comparison.png" not in card  # neither is there


def test_the_card_is_read_by_the_hub(run, tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: pip install huggingface_hub")
    convert.main([str(run), "--to", "hub", "--out", str(tmp_path / "hub")])
    read = hub.ModelCard.load(tmp_path / "hub" / "README.md")
    assert read.data.base_model == "owner/model-1.5" and read.data.library_name == "gas_engine"
    assert {"few-step-sampling", "diffusers", "comfyui"} <= set(read.data.tags) and read.data.license is None
    assert read.text.strip().startswith("# 4-step solver")


def test_a_continuous_schedule_has_no_scheduler(run, tmp_path):
    from gas_engine import GeneralizedSolver, Schedule

    save_solver(GeneralizedSolver(3, Schedule.vp_linear()), run / "solver.safetensors", model="digits", guidance=1.0)
    convert.main([str(run), "--to", "hub", "--out", str(tmp_path / "hub")])
    card = (tmp_path / "hub" / "README.md").read_text()
    assert not (tmp_path / "hub" / "scheduler").exists() and "GASScheduler" not in card and "base_model" not in card
    assert "tags:" in card and "- diffusers" not in card


def test_no_finished_run(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="2"):
        convert.main([str(tmp_path / "empty"), "--to", "hub", "--out", str(tmp_path / "hub")])
    assert "is no finished run" in capsys.readouterr().err.replace("\n", " ")


def test_pushing(run, tmp_path, monkeypatch):
    """The calls that reach the Hub, in order."""
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: pip install huggingface_hub")
    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, exist_ok):
            calls.append(("create", repo_id, exist_ok))

        def upload_folder(self, repo_id, folder_path, **options):
            calls.append(("upload", repo_id, folder_path, options))
            return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(hub, "HfApi", Api)
    assert push_to_hub(tmp_path, "me/solver", token="t", commit_message="m").endswith("me/solver/commit/1")
    assert calls == [
        ("token", "t"), ("create", "me/solver", True), ("upload", "me/solver", str(tmp_path), {"commit_message": "m"}),
    ]  # fmt: skip
