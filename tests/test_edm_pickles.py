"""EDM networks through pickles as they are published: reference outputs, every preconditioning, refusals."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest
import torch
from conftest import GOLDEN, arrays
from published import EasyDict, Persistent, dumps, edm_record
from twin import relative

from gas_engine.adapters import load_edm
from gas_engine.adapters.edm import save_edm
from gas_engine.networks import build_edm

GOLDENS = {"tiny_edm": "net", "ncsnpp": "ncsnpp", "adm": "adm"}
SMALL = {
    "img_resolution": 8, "img_channels": 2, "label_dim": 3, "model_type": "SongUNet", "model_channels": 16,
    "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "augment_dim": 9,
}  # fmt: skip


def golden_network(name):
    arguments = json.loads((GOLDEN / f"{name}_ctor.json").read_text())
    kwargs = {"label_dim": 0, **arguments["kwargs"]}
    return build_edm(kwargs, arrays(f"{name}_state"), arguments["cls"]), kwargs


def assert_reference(denoiser, name):
    wanted = arrays(f"{GOLDENS[name]}_f64")
    for i in range(3):
        out = denoiser.network(wanted[f"x{i}"].double(), wanted[f"sigma{i}"].double(), wanted.get("labels"))
        assert out.dtype == torch.float64 and relative(out, wanted[f"D{i}"]) < 1e-9


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", GOLDENS)
def test_published_pickles_match_reference(name, protocol, tmp_path):
    network, kwargs = golden_network(name)
    path = tmp_path / "network.pkl"
    path.write_bytes(dumps({"ema": edm_record(network, kwargs, positional=2), "loss_fn": None}, protocol))
    assert_reference(load_edm(path), name)


def shapes_of_files(network, kwargs):
    state = {name: value.numpy() for name, value in network.state_dict().items()}
    yield "bare", edm_record(network, kwargs)
    yield "metadata as EasyDict", EasyDict(ema=edm_record(network, kwargs, positional=3, meta=EasyDict))
    yield "plain", {"ema": {"cls": "EDMPrecond", "kwargs": kwargs, "state_dict": network.state_dict()}}
    yield "golden", {"cls": "EDMPrecond", "init_kwargs": EasyDict(kwargs), "state": state}
    flat = types.SimpleNamespace(_init_kwargs=kwargs, state_dict=network.state_dict())
    yield "flat", {"ema": Persistent("EDMPrecond", flat, (), kwargs)}
    yield "qualified", {"ema": edm_record(network, kwargs, "training.networks.EDMPrecond")}


def test_files_may_be_shaped_otherwise(tmp_path):
    network, kwargs = golden_network("adm")
    for shape, content in shapes_of_files(network, kwargs):
        path = tmp_path / f"{shape}.pkl"
        path.write_bytes(dumps(content))
        assert_reference(load_edm(path), "adm")


def test_what_the_object_says_completes_its_arguments(tmp_path):
    """Arguments left at the published defaults are attributes of the object, and the U-Net knows its own."""
    network, kwargs = golden_network("tiny_edm")
    own = ("img_resolution", "img_channels", "label_dim", "sigma_min", "sigma_max", "sigma_data")
    rest = {key: value for key, value in kwargs.items() if key not in own}
    record = edm_record(network, rest, **{name: kwargs[name] for name in own})
    (tmp_path / "a.pkl").write_bytes(dumps({"ema": record}))
    denoiser = load_edm(tmp_path / "a.pkl")
    assert (denoiser.network.sigma_min, denoiser.network.sigma_max) == (0.002, 80.0) and denoiser.shape == (3, 16, 16)
    assert_reference(denoiser, "tiny_edm")


@pytest.mark.parametrize("precond", ["EDMPrecond", "VPPrecond", "VEPrecond"])
@pytest.mark.parametrize("unet", ["SongUNet", "DhariwalUNet"])
def test_every_preconditioning_comes_back(precond, unet, tmp_path):
    kwargs = {**SMALL, "model_type": unet}
    network = build_edm(kwargs, precond=precond)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    (tmp_path / "a.pkl").write_bytes(dumps({"ema": edm_record(network, kwargs, precond, positional=1)}))
    denoiser = load_edm(tmp_path / "a.pkl")
    assert type(denoiser.network).__name__ == precond and denoiser.classes == 3
    x, t, cond = torch.randn(2, 2, 8, 8), torch.tensor(0.3, dtype=torch.float64), torch.tensor([0, 2])
    alpha, sigma, _ = denoiser.schedule(t)
    labels = torch.nn.functional.one_hot(cond, 3)
    assert torch.equal(denoiser(x, t, cond), network(x / alpha.float(), sigma / alpha, labels))


@pytest.mark.parametrize("t_eps", [1e-3, 1e-4])
@pytest.mark.parametrize(("clip", "range_"), [("clip80", (0.002, 80.0)), ("noclip", (0.0, float("inf")))])
def test_the_schedule_follows_the_range_of_the_network(t_eps, clip, range_, golden, tmp_path):
    network, kwargs = golden_network("tiny_edm")
    kwargs |= dict(zip(("sigma_min", "sigma_max"), range_, strict=True))
    (tmp_path / "a.pkl").write_bytes(dumps({"ema": edm_record(network, kwargs)}))
    schedule = load_edm(tmp_path / "a.pkl", t_eps=t_eps).schedule
    wanted = {k.removeprefix(f"edm_te{t_eps:g}_{clip}_"): v for k, v in golden("schedules_f64").items()}
    for beta in ("beta0", "beta1"):
        assert schedule.parameters[f"beta_{beta[-1]}"] == pytest.approx(float(wanted[beta]), rel=1e-9)
    assert relative(schedule.lam(wanted["t"]), wanted["marginal_lambda"]) < 1e-9


def test_a_saved_network_and_numbers_of_numpy_come_back(tmp_path):
    network, kwargs = golden_network("ncsnpp")
    odd = {**kwargs, "model_channels": np.int64(16), "sigma_data": np.float32(0.5), "channel_mult": (1, np.int64(2))}
    (tmp_path / "a.pkl").write_bytes(dumps({"ema": edm_record(network, odd)}))
    denoiser = load_edm(tmp_path / "a.pkl", name="ncsnpp")
    save_edm(denoiser.network, kwargs, tmp_path / "a.safetensors", t_eps=1e-4)
    again = load_edm(tmp_path / "a.safetensors")
    assert_reference(again, "ncsnpp")
    assert again.t_eps == 1e-4 and denoiser.name == "ncsnpp" and again.name.endswith("a.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda network, kwargs: {"ema": edm_record(network, kwargs, "iDDPMPrecond")}, "is a iDDPMPrecond; known"),
        (lambda network, kwargs: {"G_ema": edm_record(network, kwargs)}, r"under 'ema': it has the keys 'G_ema'"),
        (lambda network, kwargs: {"net": edm_record(network, kwargs), "optimizer_state": {}}, "training state"),
        (lambda network, kwargs: {"ema": [1]}, "under 'ema', but a list"),
        (lambda network, kwargs: [1], "under 'ema', but a list"),
        (lambda network, kwargs: {"ema": edm_record(network, {**kwargs, "model_channels": 8})}, "do not fit"),
        (lambda network, kwargs: {"ema": edm_record(network, {**kwargs, "wings": 2})}, "wings"),
        (lambda network, kwargs: {"ema": edm_record(network, {**kwargs, "num_blocks": 10**9})}, "num_blocks"),
        (lambda network, kwargs: {"ema": edm_record(network, {**kwargs, "model_channels": 2**40})}, "larger than"),
        (lambda network, kwargs: {"ema": edm_record(network, {**kwargs, "img_resolution": "x"})}, "these arguments"),
        (lambda network, kwargs: {"ema": edm_record(network, {**kwargs, "sigma_max": 1e-3})}, "noise range"),
    ],
)
def test_refusals_name_the_file_and_what_was_found(change, said, tmp_path):
    path = tmp_path / "odd.pkl"
    path.write_bytes(dumps(change(*golden_network("tiny_edm"))))
    with pytest.raises(ValueError, match=rf"odd\.pkl.*{said}") as caught:
        load_edm(path)
    assert "\n" not in str(caught.value)
