"""The verb evaluate: its figures against the metrics on samples drawn otherwise, resuming, references, features."""

from __future__ import annotations

import csv
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gas_engine import GeneralizedSolver, evaluate, load_denoiser, measuring, sample, save_solver
from gas_engine._cli import InputError, parse_seeds
from gas_engine.candidates import parse_steps
from gas_engine.comparison import Distance
from gas_engine.metrics import (
    diversity,
    embedded_features,
    frechet_distance,
    high_frequency_power,
    kernel_distance,
    neighbours,
    real_digits,
)
from gas_engine.metrics.inception import eight_bits, inception_features
from gas_engine.metrics.meter import METRICS, Meter, Yardstick, joined
from gas_engine.metrics.reference import open_reference
from gas_engine.metrics.tables import Row, _sane
from gas_engine.solvers.any_steps import AnyStepsSolver
from gas_engine.training import setup

HERE = Path(__file__).parent
SEEDS = "50000-50023"
QUICK = ["--seeds", SEEDS, "--teacher.steps", "6", "--device", "cpu", "--batch", "10"]


def evaluated(out, *options, model="digits"):
    evaluate.main(["--model", model, *QUICK, "--out", str(out), *options])
    with (out / "evaluation.csv").open() as file:
        return list(csv.DictReader(file))


def failure(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A run's directory with a solver of three steps, and an evaluation of it beside UniPC."""
    path = tmp_path_factory.mktemp("evaluate")
    (path / "run").mkdir()
    solver = GeneralizedSolver(3, load_denoiser("digits").schedule, start="quadratic")
    with torch.no_grad():
        solver.xi.add_(0.01)
    save_solver(solver, path / "run" / "solver.safetensors", model="digits")
    (path / "run" / "config.json").write_text(json.dumps({"train_seeds": "0-99"}))
    rows = evaluated(path / "out", "--solver", str(path / "run"), "unipc", "--steps", "3")
    return path, rows


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes most of the time of a short evaluation."""
    for name in ("_plot", "_plot_spectrum"):
        monkeypatch.setattr(f"gas_engine.metrics.tables.{name}", lambda *_: None)


def drawn(path, solver, steps, grid="quadratic"):
    """Samples by the verb that draws them."""
    argv = ["--model", "digits", "--solver", solver, "--steps", str(steps), "--seeds", SEEDS, "--grid", grid]
    argv += ["--format", "npy", "--out", str(path), "--device", "cpu"]
    sample.main(argv + (["--t-eps", "1e-4"] if grid == "logSNR" else []))
    return torch.from_numpy(np.load(path / "samples.npy"))


def test_figures_are_the_metrics_of_the_samples(here, tmp_path):
    path, (row, unipc, last) = here
    mine = drawn(tmp_path, str(path / "run" / "solver.safetensors"), 3)
    teacher, data = drawn(tmp_path, "unipc3-bh1", 6, "logSNR"), real_digits()
    error, features = (mine - teacher).double(), embedded_features("digits")
    wanted = {
        "l1": error.abs().mean(), "l2": error.square().mean(), "rmse": error.square().mean().sqrt(),
        "psnr": 10 * torch.log10(4 / error.square().mean()),
        "fd_data": frechet_distance(features(mine), features(data)),
        "fd_teacher": frechet_distance(features(mine), features(teacher)),
        "kid_data": kernel_distance(features(data), features(mine)), "diversity": diversity(features(mine)),
        "detail": high_frequency_power(mine) / high_frequency_power(teacher),
        **neighbours(features(data), features(mine))._asdict(),
    }  # fmt: skip
    for name, value in wanted.items():
        assert float(row[name]) == pytest.approx(float(value), rel=1e-4), name
    assert [*row] == ["model", "solver", "setting", "steps", "samples", *METRICS]
    assert (row["solver"], row["setting"], row["steps"], row["samples"]) == ("run", "gs", "3", "24")
    assert (unipc["solver"], unipc["setting"]) == ("unipc", "unipc3-bh1, quadratic, 0.001")
    assert last["solver"] == "teacher" and float(last["l1"]) == 0 == float(last["fd_teacher"])
    assert row["sfid"] == "" == row["cmmd"] == last["psnr"]


def test_the_files(here):
    out = here[0] / "out"
    table = (out / "evaluation.md").read_text().splitlines()
    assert table[0].startswith("| solver | setting | steps | l1 |") and len(table) == 2 + 3
    with (out / "spectrum.csv").open() as file:
        spectrum = list(csv.DictReader(file))
    assert {row["solver"] for row in spectrum} == {"run", "unipc", "teacher", "data"}
    assert {row["ratio"] for row in spectrum if row["solver"] == "teacher"} == {"1"}
    for name in ("evaluation.png", "spectrum.png"):
        with Image.open(out / name) as image:
            assert image.width > 600 and image.height > 250 and len(image.convert("RGB").getcolors(10**6)) > 20


def test_lpips_is_of_pictures_sample_by_sample(here, tmp_path, no_pictures, monkeypatch):
    """With a stand-in for the network, whose weights are no part of this package: the mean |x - y| of each."""

    class Stand:
        def __init__(self, name, device):
            assert name == "lpips"

        def made(self, y):
            return (y,)

        def of(self, x, y, made):
            assert made[0] is y and len(y) == 1
            return (x - y).abs().flatten(1).mean(1)

    monkeypatch.setattr(evaluate, "Perceptual", Stand)
    row, _ = evaluated(tmp_path, "--solver", "unipc", "--steps", "3", "--metrics", "l1,lpips")
    assert row["lpips"] == row["l1"] == here[1][1]["l1"] and row["fd_data"] == "" == row["l2"]


def test_a_killed_evaluation_goes_on(here, tmp_path, monkeypatch, no_pictures):
    """Stopped between two solvers: the first is not sampled again, and the table has the same bytes."""
    path, _ = here
    asked = ["--solver", str(path / "run"), "unipc", "--steps", "3"]
    original, calls = measuring.rollout, []

    def stopping(denoiser, noise, tableau, cond):
        calls.append(len(noise))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(denoiser, noise, tableau, cond)

    monkeypatch.setattr(measuring, "rollout", stopping)
    with pytest.raises(SystemExit) as stop:
        evaluated(tmp_path, *asked)
    assert stop.value.code == 130 and not (tmp_path / "evaluation.csv").exists()
    evaluated(tmp_path, *asked)
    assert calls == [10, 10, 4] + [10, 10] + [10, 10, 4]
    assert (tmp_path / "evaluation.csv").read_bytes() == (path / "out" / "evaluation.csv").read_bytes()
    assert len(evaluated(tmp_path, *asked[:3], "euler", *asked[3:])) == 4 and len(calls) == 8 + 3
    evaluated(tmp_path, *asked, "--seeds", "50000-50022")
    assert len(calls) == 8 + 3 + 6
    for file in (tmp_path / "measured").iterdir():
        file.write_bytes(b"damaged")
    evaluated(tmp_path, *asked)
    assert len(calls) == 8 + 3 + 6 + 6
    assert (tmp_path / "evaluation.csv").read_bytes() == (path / "out" / "evaluation.csv").read_bytes()


def test_two_processes_are_one(here, tmp_path):
    path, _ = here
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    argv = [sys.executable, "-m", "gas_engine.evaluate", "--model", "digits", *QUICK, "--out", str(tmp_path)]
    argv += ["--solver", str(path / "run"), "unipc", "--steps", "3"]
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(argv, env={**os.environ, **told, "RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.DEVNULL)
        for rank in "01"
    ]
    assert [process.wait(240) for process in both] == [0, 0]
    for name in ("evaluation.csv", "spectrum.csv"):
        assert (tmp_path / name).read_bytes() == (path / "out" / name).read_bytes()


def test_a_solver_of_several_k_has_a_row_for_each(tmp_path, no_pictures):
    solver = AnyStepsSolver(range(2, 5), load_denoiser("digits").schedule)
    (tmp_path / "any").mkdir()
    save_solver(solver, tmp_path / "any" / "solver.safetensors", model="digits")
    options = ["--solver", str(tmp_path / "any"), "--metrics", "l1"]
    every, some = (evaluated(tmp_path / "out", *options, *more) for more in ([], ["--steps", "2,4"]))
    assert [(row["solver"], row["setting"], row["steps"]) for row in every[:-1]] == [
        ("any", "any, 2 to 4", steps) for steps in "234"
    ]
    assert some == [every[0], every[2], every[3]] and len({row["l1"] for row in every}) == 4


def test_classical_is_the_best_of_every_family(tmp_path, monkeypatch, no_pictures):
    monkeypatch.setattr("gas_engine.comparison.T_EPS", (1e-3,))
    monkeypatch.setattr("gas_engine.comparison.GRIDS", ("uniform", "quadratic"))
    quick = ("--steps", "2", "--metrics", "l1", "--features", "none", "--selection")
    rows = evaluated(tmp_path, *quick, "8")
    chosen = json.loads((tmp_path / "chosen.json").read_text())
    ((_, best),) = chosen.items()
    assert [row["solver"] for row in rows] == [*best, "teacher"] and len(best) == 7
    assert rows[0]["setting"] == "euler, {}, {:g}".format(*best["DDIM"][1:])
    assert rows[0]["l2"] == "" == rows[0]["fd_data"]
    evaluated(tmp_path, *quick, "4")
    assert len(json.loads((tmp_path / "chosen.json").read_text())) == 2, "chosen on other seeds"
    monkeypatch.setattr("gas_engine.comparison.best_variants", None)  # known
    assert evaluated(tmp_path, *quick, "8") == rows


def test_states_that_are_no_known_pictures(tmp_path, monkeypatch, capsys, no_pictures):
    """Distances and spectra all the same; what is missing is said with the way to it."""
    monkeypatch.chdir(HERE)
    row, _ = evaluated(tmp_path, "--solver", "unipc", "--steps", "3", model="toy:make")
    assert float(row["l1"]) > 0 and float(row["detail"]) > 0 and row["fd_data"] == "" == row["lpips"]
    said = capsys.readouterr().out
    assert "no data come with mixture" in said and "--features FILE.pt" in said


# References and features


class Means(torch.nn.Module):
    def forward(self, x):
        return x.flatten(2).mean(1)[:, ::5]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "means.pt"
    torch.jit.trace(Means(), torch.zeros(2, 1, 8, 8)).save(str(path))
    return path


def test_a_directory_and_statistics_give_one_distance(script, tmp_path, no_pictures):
    """Images as files, as ADM's array, and the mean and covariance of their features as EDM's statistics."""
    levels = eight_bits(real_digits()[:40]).numpy()
    (tmp_path / "images" / "more").mkdir(parents=True)
    for i, image in enumerate(levels[:, 0]):
        Image.fromarray(image).save(tmp_path / "images" / ("more" if i % 2 else "") / f"{i}.png")
    np.savez(tmp_path / "adm.npz", arr_0=levels.transpose(0, 2, 3, 1))
    features = Means()(torch.from_numpy(levels).float() / 127.5 - 1).double().numpy()
    np.savez(tmp_path / "edm.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    found = {}
    for name in ("images", "adm.npz", "edm.npz"):
        options = ["--solver", "unipc", "--steps", "3", "--features", str(script), "--reference", str(tmp_path / name)]
        found[name] = evaluated(tmp_path / "out", *options)[0]
    distances = [float(row["fd_data"]) for row in found.values()]
    assert distances == pytest.approx([distances[0]] * 3, rel=1e-4)
    assert found["images"]["kid_data"] == found["adm.npz"]["kid_data"] != "" != found["images"]["cmmd"]
    assert found["edm.npz"]["kid_data"] == "" == found["edm.npz"]["recall"] and found["edm.npz"]["fd_teacher"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of torch-fidelity's Inception."""
    reason = "needs `pip install torch-fidelity`"
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason=reason)
    cls, patch = module.FeatureExtractorInceptionV3, pytest.MonkeyPatch()
    patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: None)
    patch.setattr(cls, "load_state_dict", lambda *_: None)
    torch.manual_seed(0)
    network = cls("inception", ["2048"])
    patch.undo()
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path, network


def test_inception_is_torch_fidelitys(weights):
    path, network = weights
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    extractor = inception_features(weights=path)
    features, spatial = extractor.both(images)
    with torch.no_grad():
        (wanted,) = network(((images + 1) * 127.5).round().to(torch.uint8))
    assert features.shape == (3, 2048) and torch.equal(features, wanted)
    assert spatial.shape == (3, 7 * 17 * 17) and float(spatial.min()) >= 0
    with pytest.raises(ValueError, match=r"\[3, 4, 16, 16\]"):
        extractor.both(torch.zeros(3, 4, 16, 16))


def test_inception_without_weights_says_where_they_belong(tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity", reason="needs `pip install torch-fidelity`")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match="curl"):
        inception_features()
    (tmp_path / "odd.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"odd\.pth does not hold"):
        inception_features(weights=tmp_path / "odd.pth")


def test_figures_of_samples_at_infinity():
    """Neither distance, nor PSNR, nor the table beside finite rows stops at one that diverged."""
    denoiser, fine = load_denoiser("digits"), torch.zeros(2, 1, 8, 8)
    far = Meter().samples(denoiser, fine + torch.inf, fine, torch.device("cpu"))
    scores = Yardstick(Meter().samples(denoiser, fine, fine, torch.device("cpu"))).scores(far, ["l1", "psnr"])
    assert scores == {"l1": math.inf, "psnr": None}
    found = [Distance("", "", 1.0, rmse, fine).psnr for rmse in (0.0, 0.2, math.inf, math.nan)]
    assert found[:3] == [math.inf, pytest.approx(20), -math.inf] and math.isnan(found[3])
    rows = [Row("", "", 4, {"l1": l1}, {}) for l1 in (0.1, 2.0, math.nan, math.inf, 0.0)]
    for some in (rows, rows[::-1]):
        assert {row.scores["l1"] for row in _sane(some)} == {0.1, 0.0}


def test_one_column_is_drawn_and_none_leaves_an_empty_picture(tmp_path):
    for metrics in ("psnr", "sfid"):
        evaluated(tmp_path, "--solver", "unipc", "--steps", "3", "--metrics", metrics, "--features", "none")
        with Image.open(tmp_path / "evaluation.png") as image:
            assert image.width > 300


def test_samples_that_are_not_finite_have_no_features():
    meter = Meter()
    denoiser, fine = load_denoiser("digits"), torch.zeros(2, 1, 8, 8)
    good = meter.samples(denoiser, fine, fine, torch.device("cpu"))
    bad = meter.samples(denoiser, fine * torch.nan, fine, torch.device("cpu"))
    both = joined([good, bad])
    assert {*both} == {"count", "l1", "l2"} and both["l1"].isnan() and float(both["count"]) == 4


# Bad input


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        (["--solver", "nothing"], "there is no solver 'nothing'"),
        (["--solver", "absent.safetensors"], "absent.safetensors"),
        (["--solver", "unipc", "--steps", "0"], "got '0'"),
        (["--solver", "unipc", "--steps", "4-2"], "got '4-2'"),
        (["--solver", "unipc", "--steps", "4", "--grid", "odd"], "'odd'"),
        (["--solver", "unipc", "--seeds", "40000-40003"], "40000-40063"),
        (["--metrics", "l1,fid"], "no 'fid'"),
        (["--features", "absent.pt"], "absent.pt"),
        (["--reference", "nowhere"], "'nowhere'"),
        (["--batch", "0"], "got 0"),
        (["--selection", "0"], "--selection must be 1 to 64, got 0"),
        (["--selection", "65"], "--selection must be 1 to 64, got 65"),
        (["--teacher.solver", "rk45"], "rk45"),
    ],
)
def test_bad_input(tmp_path, capsys, options, seen):
    assert seen in failure(capsys, ["--model", "digits", *QUICK, "--out", str(tmp_path / "out"), *options])
    assert not (tmp_path / "out" / "evaluation.csv").exists()


def test_what_a_solver_was_trained_on_is_refused(here, tmp_path, capsys):
    path, _ = here
    base = ["--model", "digits", "--solver", str(path / "run"), "--out", str(tmp_path)]
    assert "run was trained on" in failure(capsys, [*base, "--seeds", "90-110"])
    assert "solver of 3 evaluations, but --steps 4" in failure(capsys, [*base, "--steps", "4"])


@pytest.mark.parametrize(
    ("arrays", "seen"),
    [
        ({"mu": np.zeros(4)}, "neither"),
        ({"mu": np.zeros(4), "sigma": np.eye(3)}, r"\[4\] and \[3, 3\]"),
        ({"mu": np.zeros(4, int), "sigma": np.eye(4)}, "floating"),
        ({"mu": np.array([{}] * 4), "sigma": np.eye(4)}, "cannot read"),
        ({"arr_0": np.zeros((3, 9, 8, 1), np.uint8)}, r"\[3, 9, 8, 1\]"),
        ({"arr_0": np.zeros((3, 8, 8, 1))}, "float64"),
    ],
)
def test_statistics_that_are_none(tmp_path, arrays, seen):
    np.savez(tmp_path / "file.npz", **arrays)
    with pytest.raises(ValueError, match=seen):
        open_reference(str(tmp_path / "file.npz"), "digits", (1, 8, 8))


@pytest.mark.parametrize("keep", [0, 10, 200])
def test_cut_files_are_refused(tmp_path, keep):
    np.savez(tmp_path / "file.npz", mu=np.zeros(40), sigma=np.eye(40))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "file.npz").read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut\.npz"):
        open_reference(str(tmp_path / "cut.npz"), "digits", (1, 8, 8))


def test_images_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        open_reference(str(tmp_path), "digits", (1, 8, 8))
    Image.new("L", (9, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is of 9x8 pixels, and the model's pictures of 8x8"):
        open_reference(str(tmp_path), "digits", (1, 8, 8)).read(0)
    (tmp_path / "a.png").write_bytes(b"\x89PNG no image")
    with pytest.raises(ValueError, match=r"cannot read the image .*a\.png"):
        open_reference(str(tmp_path), "digits", (1, 8, 8)).read(0)


def test_modules_of_other_outputs_are_refused(tmp_path):
    from gas_engine.metrics import torchscript_features

    torch.jit.trace(torch.nn.Identity(), torch.zeros(2, 1, 8, 8)).save(str(tmp_path / "same.pt"))
    with pytest.raises(ValueError, match=r"same\.pt must map images"):
        torchscript_features(tmp_path / "same.pt").features(torch.zeros(2, 1, 8, 8))
    (tmp_path / "odd.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no TorchScript module"):
        torchscript_features(tmp_path / "odd.pt")


@given(st.text("0123456789-, x", max_size=12))
def test_steps_are_numbers_or_refused(text):
    try:
        steps = parse_steps(text)
    except InputError as error:
        assert repr(text) in str(error)
    else:
        assert steps == sorted(parse_seeds(text)) and steps[0] >= 1


def test_the_seeds_of_the_verbs_are_apart():
    assert not {*parse_seeds(evaluate.Config.seeds)} & {*setup.SELECTION_SEEDS}
