"""Published sets and foreign files as safetensors: what was written is read back by the same loaders."""

from __future__ import annotations

import json
import pickle
import types

import numpy as np
import pytest
import torch
from published import dumps, edm_record, student, teacher_set
from safetensors.torch import load_file
from test_edm_pickles import assert_reference, golden_network
from torch import nn

from gas_engine import Denoiser, Schedule, load_solver
from gas_engine.adapters import load_edm
from gas_engine.adapters.converting import kind_of, to_safetensors
from gas_engine.adapters.published import read_published_teacher_set
from gas_engine.adapters.r3gan import load_r3gan
from gas_engine.networks import R3GANDiscriminator
from gas_engine.training.data import published_set


def prompt(i):
    return f"a photograph of {i} cats ☃"


@pytest.mark.parametrize("latents", [True, False])
@pytest.mark.parametrize("classes", [None, int, np.int64, torch.tensor, prompt])
def test_published_teacher_sets(latents, classes, tmp_path):
    table, path = teacher_set(3, classes, latents, (4, 8, 8) if latents else (3, 8, 8)), tmp_path / "dataset.pkl"
    path.write_bytes(pickle.dumps(table))
    written = to_safetensors(path, tmp_path / "set.safetensors")
    assert kind_of(path) == "teacher set" and json.loads(written[1].read_text())["rows"] == 3
    for rows in (read_published_teacher_set(path), read_published_teacher_set(written[0])):
        assert torch.equal(rows.noise, torch.stack(table["noise"])) and rows.noise.dtype == torch.float32
        assert torch.equal(rows.samples, torch.stack(table["latents" if latents else "images"])) and len(rows) == 3
        if classes is None:
            assert rows.cond is None
        elif classes is prompt:
            assert rows.cond == [prompt(i) for i in range(3)]
        else:
            assert rows.cond.dtype == torch.int64 and rows.cond.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"noise": []}, "not a list of arrays"),
        ({"noise": None}, "not a list of arrays"),
        ({"noise": [torch.zeros(3, 8, 8), torch.zeros(3, 8, 4)]}, r"\[3, 8, 4\]"),
        ({"images": [torch.zeros(3, 8, 8)]}, "3 rows of noise and 1 of samples"),
        ({"images": ["x"]}, "row of its images is 'x'"),
        ({"condition": [1, "x", 2]}, "neither all classes nor all prompts"),
        ({"condition": [1]}, "one for each of 3 rows"),
    ],
)
def test_sets_with_wrong_rows_are_refused(change, said, tmp_path):
    (tmp_path / "dataset.pkl").write_bytes(pickle.dumps({**teacher_set(3, latents=False), **change}))
    with pytest.raises(ValueError, match=rf"dataset\.pkl is no published teacher set: .*{said}"):
        read_published_teacher_set(tmp_path / "dataset.pkl")


def test_edm_networks_convert(tmp_path):
    network, kwargs = golden_network("adm")
    (tmp_path / "a.pkl").write_bytes(dumps({"ema": edm_record(network, kwargs, positional=3)}))
    tensors, facts = to_safetensors(tmp_path / "a.pkl", tmp_path / "a.safetensors")
    facts = json.loads(facts.read_text())
    assert facts["kind"] == "edm" and facts["precond"] == "EDMPrecond" and facts["kwargs"]["label_dim"] == 10
    assert facts["parameters"] == sum(p.numel() for p in network.parameters())
    assert_reference(load_edm(tensors), "adm")


def test_discriminators_convert(tmp_path):
    D = R3GANDiscriminator([8, 16], [2, 4], [1, 2], channels=2, classes=5, embedding=3)
    for p in D.parameters():
        nn.init.normal_(p, std=0.3)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"G": None, "D": nn.ModuleDict({"Model": D})}))
    tensors, facts = to_safetensors(tmp_path / "a.pkl", tmp_path / "a.safetensors")
    x = torch.randn(3, 2, 8, 8)
    assert torch.equal(load_r3gan(tensors)(x), load_r3gan(tmp_path / "a.pkl")(x))
    assert json.loads(facts.read_text())["shape"] == [2, 8, 8]


def test_checkpoints_keep_names_and_say_the_rest(tmp_path):
    base, knot = torch.randn(4, 5), []
    knot.append(knot)
    content = {
        "state_dict": {"model.a": base, "model.tied": base, "model.t": base.T, "model.half": base.half()}, "epoch": 3,
        "callbacks": {"best": types.SimpleNamespace(score=float("nan"))}, "knot": knot, "optimizer": [torch.zeros(2)],
    }  # fmt: skip
    torch.save(content, tmp_path / "a.ckpt")
    assert kind_of(tmp_path / "a.ckpt") == "checkpoint"
    tensors, facts = to_safetensors(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    got, rest = load_file(tensors), json.loads(facts.read_text())["rest"]
    assert all(torch.equal(got[name], wanted) for name, wanted in content["state_dict"].items()) and len(got) == 4
    assert rest["epoch"] == 3 and rest["callbacks"]["best"] == {
        "class": "types.SimpleNamespace", "state": {"score": "nan"},
    }  # fmt: skip
    assert rest["optimizer"] == [{"dtype": "torch.float32", "shape": [2]}]


def test_students_are_recognised_and_read(tmp_path):
    rows, path = student(4), tmp_path / "student.pt"
    torch.save({"ema": {"shadow_params": rows, "decay": 0.999}, "model": {}, "optim": {}, "step": 7}, path)
    assert kind_of(path) == "student"
    solver = load_solver(path, Schedule.edm(), 1e-3)
    assert torch.equal(solver.theta, rows[0].double()) and torch.equal(solver.phi_a[:, 3], rows[9].double())
    with pytest.raises(ValueError, match=r"student\.pt is a published student.*load_solver"):
        to_safetensors(path, tmp_path / "a.safetensors")


def test_what_cannot_be_converted_says_what_it_holds(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"epoch": 1}))
    with pytest.raises(ValueError, match=r"a\.pkl is no EDM network.*it holds 'epoch'"):
        to_safetensors(tmp_path / "a.pkl", tmp_path / "a.safetensors")
    torch.save({"w": torch.zeros(2)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="no name for a"):
        to_safetensors(tmp_path / "w.pt", tmp_path / "a.json")
    with pytest.raises(ValueError, match="absent"):
        kind_of(tmp_path / "absent.pkl")
    assert not list(tmp_path.glob("*.safetensors"))


def test_published_sets_of_other_conditions(tmp_path):
    """Refused before anything is trained: what the set tells must be what the model takes."""
    path = tmp_path / "dataset.pkl"
    told = Denoiser(lambda x, t, c: x, Schedule.flow(), "flow", (4, 8, 8), classes=3)
    untold = Denoiser(lambda x, t, c: x, Schedule.flow(), "flow", (4, 8, 8), name="untold")
    for classes, model, said in (
        (lambda i: i + 1, told, "class 3; those of"), (lambda i: i, untold, "holds classes, and untold takes none"),
        (None, told, "holds no conditions"), (str, told, "holds prompts"),
    ):  # fmt: skip
        path.write_bytes(pickle.dumps(teacher_set(3, classes, True, (4, 8, 8))))
        with pytest.raises(ValueError, match=said):
            published_set(path, model, [0, 1])
    path.write_bytes(pickle.dumps(teacher_set(3, lambda i: i, True, (4, 8, 8))))
    assert published_set(path, told, [2, 0])[2][1].tolist() == [2, 0]
