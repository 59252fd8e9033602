"""docs/models.md: every command runs, on a small random network of the family, saved in the real format."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import latent
import published
import pytest
import torch
from conftest import GOLDEN, arrays
from pages import ROOT, run, smaller
from pipelines import saved  # noqa: F401 (a fixture)
from twin import relative

from gas_engine import load_solver, rollout
from gas_engine.denoiser import seeded
from gas_engine.models import ModelOptions, open_model
from gas_engine.networks import R3GANDiscriminator, build_edm

PAGE = (ROOT / "docs" / "models.md").read_text()
FAMILIES = [name for names in re.findall(r"<!-- run: (.*?) -->", PAGE) for name in names.split()]

# By which the pipelines are called; FLUX.1-schnell is told none.
GUIDANCE = {"sd15": 7.5, "sd21v": 7.5, "sdxl": 7.0, "sd3": 7.0, "flux": 3.5, "flux_schnell": 1.0, "pixart": 4.5}
GUIDANCE["dit"] = 1.5
FLUX = ("flux", "flux_schnell")  # whose pictures are large unless it is told otherwise
T5 = ("sd3", "pixart", *FLUX)  # whose texts are long


def commands(family: str) -> list[list[str]]:
    """The words of the family's commands on the page, without the program's name."""
    block = re.search(rf"<!-- run: [^>]*\b{family}\b[^>]*-->\n```sh\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    lines = [line for line in block[1].splitlines() if line.strip()]
    assert all(line.startswith("gas-engine ") for line in lines)
    return [shlex.split(line)[1:] for line in lines]


@pytest.fixture
def model(request, saved, tmp_path, monkeypatch):  # noqa: F811
    """Where the family's small model is, from a working directory of its own."""
    family = request.param
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GAS_ENGINE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "captions.txt").write_text("a photo of a cat\na red house\nthe small dog on a tree\n")
    if family == "edm":
        arguments = json.loads((GOLDEN / "tiny_edm_ctor.json").read_text())
        network = build_edm(arguments["kwargs"], arrays("tiny_edm_state"), arguments["cls"])
        (tmp_path / "edm.pkl").write_bytes(published.dumps({"ema": published.edm_record(network, arguments["kwargs"])}))
        return family, "edm.pkl"
    if family == "ldm":
        return family, latent.save(tmp_path / "ldm", "cin256", torch.float32)
    if family == "mymodel":
        code = re.search(r"```python\n(# mymodel.py\n.*?)```", PAGE, re.DOTALL)
        assert code is not None
        (tmp_path / "mymodel.py").write_text(code[1])
        return family, "mymodel:make_denoiser"
    return family, saved(family)


@pytest.fixture
def small_parts(monkeypatch):
    """A narrow discriminator, random weights in the smallest network of LPIPS, and one family's pictures drawn."""
    import lpips

    made = lpips.LPIPS(net="squeeze", pretrained=True, pnet_rand=True, verbose=False).requires_grad_(False)
    monkeypatch.setattr(lpips, "LPIPS", lambda net, **_: made)

    def discriminator(shape):
        stages = max(1, shape[1].bit_length() - 2)
        return R3GANDiscriminator([8] * stages, [2] * stages, [1] * stages, channels=shape[0])

    monkeypatch.setattr("gas_engine.training.setup.discriminator_for", discriminator)
    monkeypatch.setattr("gas_engine.pictures.history_plot", lambda *_, **__: None)


@pytest.mark.parametrize("model", FAMILIES, indirect=True, ids=FAMILIES)
def test_commands_of_the_page(model, monkeypatch, no_pictures, small_parts):
    family, path = model
    if family != "sd15":  # one decodes for pictures that nobody draws
        monkeypatch.setattr("gas_engine.pictures.pictures_of", lambda denoiser, states, device="cpu": states)
    for words in commands(family):
        here = {"MODEL": str(path)} | ({"207": "7"} if family == "ldm" else {})  # which has ten classes
        words = [here.get(word, word) for word in smaller(words)]
        if words[0] != "convert":
            words += ["--text-length", "16"] if family in T5 else []
            words += ["--resolution", "16"] if family in FLUX else []
        run(monkeypatch, words)
    if family in GUIDANCE:
        (scheduler,) = Path("runs").glob("*/scheduler")
        assert_pipeline_repeats(family, path, scheduler)


def assert_pipeline_repeats(family, path, directory):
    """The same noise gives the same sample through the pipeline with the exported scheduler as through ``rollout``."""
    from diffusers import DiffusionPipeline

    from gas_engine.export import GASScheduler

    prompt, guidance = "a photo of a cat", GUIDANCE[family]
    told = {"prompts": "207"} if family == "dit" else {"prompts": prompt}
    told |= ({"text_length": 16} if family in T5 else {}) | ({"resolution": 16} if family in FLUX else {})
    denoiser = open_model(ModelOptions(str(path), guidance=str(guidance), **told))
    solver = load_solver(directory.parent / "solver.safetensors")
    noise, cond = seeded(denoiser, [3])
    with torch.no_grad():
        wanted = rollout(denoiser, noise, solver.tableau(denoiser.prediction), cond)
    pipeline = DiffusionPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = GASScheduler.from_pretrained(directory)
    options = {"num_inference_steps": solver.steps, "guidance_scale": guidance}
    options |= {"max_sequence_length": 16} if family in T5 else {}
    options |= {"use_resolution_binning": False} if family == "pixart" else {}
    if family == "dit":  # which draws its noise itself, and decodes
        generator = torch.Generator().manual_seed(3)
        images = pipeline([207], generator=generator, output_type="np", **options).images
        got, wanted = torch.from_numpy(images), (denoiser.decoder(wanted) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    elif family in FLUX:
        channels, rows, columns = denoiser.shape
        packed = pipeline._pack_latents(noise, 1, channels, rows, columns)
        side = rows * pipeline.vae_scale_factor
        packed = pipeline(
            prompt, height=side, width=side, latents=packed, output_type="latent", **options
        ).images  # fmt: skip
        got = pipeline._unpack_latents(packed, side, side, pipeline.vae_scale_factor)
    else:
        got = pipeline(prompt, latents=noise, output_type="latent", **options).images
    assert relative(got, wanted) < 1e-5
