"""Latent diffusion: original checkpoints against the outputs of the original code, and refusals in one sentence."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from latent import GOLDEN, KINDS, UNET, changed, golden, save, save_checkpoint, state_dict
from torch import Tensor, nn
from twin import plain_rollout, relative

from gas_engine import Denoiser, GeneralizedSolver, MemoryPolicy, guided, rollout
from gas_engine.adapters._ldm_config import read_config
from gas_engine.adapters.ldm import load_ldm
from gas_engine.denoiser import seeded
from gas_engine.losses import decoded, distillation_loss
from gas_engine.memory import ByteTracker, checkpoint_blocks, lean

pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def models(files: dict[str, Path]) -> dict[str, Denoiser]:
    return {kind: load_ldm(directory) for kind, directory in files.items()}


def outputs(denoiser: Denoiser, data: dict[str, Tensor], x: Tensor | None = None) -> Tensor:
    """One label a call."""
    x = data["x"].to(denoiser.function.network.dtype) if x is None else x
    cond = data["classes"] if denoiser.classes else None
    return torch.stack([denoiser(x, (label + 1) / 1000, cond) for label in data["labels"]])


@pytest.mark.parametrize("kind", KINDS)
def test_network_and_first_stage_equal_the_original(kind, models):
    """Values, and gradients in the latents, at a whole label and a broken one; float64, 1e-9."""
    data, denoiser = golden(kind), models[kind]
    x = data["x"].clone().requires_grad_()
    y = outputs(denoiser, data, x)
    # cin256 says use_ema: False; _heads says so too; LSUN's says nothing, and has averages.
    assert relative(y, data["averaged" if kind == "lsun_beds256" else "plain"]) < 1e-9
    if kind != "lsun_beds256":
        assert relative(torch.autograd.grad(y.square().sum(), x)[0], data["plain_grad"]) < 1e-9
    image = denoiser.decoder(x)
    assert image.shape == (2, 3, 16, 16) and relative(image, data["image"]) < 1e-9
    assert relative(torch.autograd.grad(image.square().sum(), x)[0], data["image_grad"]) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_in_single_precision(kind, tmp_path):
    directory = save(tmp_path, kind, torch.float32, zipped=kind != "cin256_heads", use_ema=False)  # or the older format
    denoiser, data = load_ldm(directory / "model.ckpt"), golden(kind)
    assert relative(outputs(denoiser, data), data["plain"]) < 1e-5
    assert relative(denoiser.decoder(data["x"].float()), data["image"]) < 1e-5
    assert not any(p.requires_grad for part in (denoiser, denoiser.decoder) for p in part.parameters())
    assert {p.dtype for part in (denoiser, denoiser.decoder) for p in part.parameters()} == {torch.float32}


def test_facts_of_a_model(models):
    by_class, plain = models["cin256"], models["lsun_beds256"]
    assert (by_class.prediction, by_class.shape, by_class.classes) == ("noise", (3, 8, 8), 10)
    assert by_class.conditioning.null.tolist() == [10]
    assert plain.conditioning is None and seeded(plain, [0, 1])[1] is None
    noise, classes = seeded(by_class, range(50))
    assert noise.shape == (50, 3, 8, 8) and int(classes.max()) < 10


def test_schedule_is_the_published_one(models, files, tmp_path):
    alphas = golden_schedule()["alphas_cumprod"]
    schedule = models["cin256"].schedule
    assert schedule == models["lsun_beds256"].schedule
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(schedule.alpha(t) ** 2, alphas, rtol=1e-12, atol=0)
    other = save(tmp_path, "cin256", linear_end=0.012)
    with pytest.raises(ValueError, match=r"do not belong together: their betas are 0.0015..0.0195 and 0.0015..0.012"):
        load_ldm(other)


def golden_schedule() -> dict[str, Tensor]:
    import numpy as np

    with np.load(GOLDEN / "ldm_f64.npz") as data:
        return {name: torch.from_numpy(data[name]) for name in ("betas", "alphas_cumprod")}


def test_averaged_weights_are_taken_where_the_original_takes_them(files, tmp_path):
    data = golden("cin256")
    averaged = load_ldm(save(tmp_path / "yes", "cin256", use_ema=True))
    assert relative(outputs(averaged, data), data["averaged"]) < 1e-9
    pruned = load_ldm(save(tmp_path / "pruned", "cin256_heads", use_ema=True))  # has none
    assert relative(outputs(pruned, golden("cin256_heads")), golden("cin256_heads")["plain"]) < 1e-9
    weights = {k: v for k, v in state_dict("lsun_beds256").items() if k != "model_ema.diffusion_modelout0weight"}
    save_checkpoint(tmp_path / "model.ckpt", weights)
    with pytest.raises(ValueError, match=r"does not hold the network of .*model_ema.diffusion_modelout0weight"):
        load_ldm(tmp_path / "model.ckpt", files["lsun_beds256"] / "config.yaml")


def test_guidance_with_the_learned_null_class(models):
    denoiser, data = models["cin256"], golden("cin256")
    x, t, null = data["x"], torch.tensor(0.438, dtype=torch.float64), denoiser.conditioning.null
    told, nothing = denoiser(x, t, data["classes"]), denoiser(x, t, torch.tensor([10, 10]))
    assert guided(denoiser, 1.0, null) is denoiser and relative(nothing, told) > 0.01
    twice = guided(denoiser, 2.0, null)
    assert relative(twice(x, t, data["classes"]), 2 * told - nothing) < 1e-12
    assert twice.decoder is denoiser.decoder


@pytest.mark.parametrize("kind", ["cin256", "lsun_beds256"])
def test_gradients_through_the_sampler_equal_plain_autograd(kind, models):
    """Lean, in blocks, one graph; loss in pixels, through the rounding; float64."""
    base, data = models[kind], golden(kind)
    wrap = (lambda d: guided(d, 2.0, base.conditioning.null)) if base.classes else (lambda d: d)
    cond = data["classes"] if base.classes else None
    solver = GeneralizedSolver(3, base.schedule, start="quadratic")
    target = base.decoder(data["x"].flip(0)).detach()

    def gradients(x0: Tensor, images: Tensor) -> Tensor:
        solver.zero_grad()
        (images - target).abs().mean().backward()
        return torch.cat([p.grad.flatten() for p in solver.parameters()])

    x0 = plain_rollout(wrap(base), data["x"], solver.tableau("noise"), cond)
    wanted = gradients(x0, base.decoder(x0))
    small = wrap(checkpoint_blocks(lean(base)))
    y0 = rollout(small, data["x"], solver.tableau("noise"), cond, MemoryPolicy(1, split_guidance=bool(base.classes)))
    assert relative(y0, x0) < 1e-9
    assert relative(gradients(y0, lean(base.decoder)(y0)), wanted) < 1e-9 and float(wanted.norm()) > 0


def test_lean_keeps_less(models):
    """Bytes that a call and its picture keep, stock against lean, and against blocks."""
    for kind in ("cin256", "lsun_beds256"):
        denoiser, x = models[kind], golden(kind)["x"].clone().requires_grad_()
        cond, t = (golden(kind)["classes"] if denoiser.classes else None), torch.tensor(0.5, dtype=torch.float64)
        kept = []
        for view in (denoiser, lean(denoiser), checkpoint_blocks(lean(denoiser), "all")):
            with ByteTracker() as tracker:
                y = view(x, t, cond)
            kept.append(tracker.live)
            del y
        assert kept[0] > 1.5 * kept[1] > 2 * kept[2], kept


def test_losses_in_pixels(models):
    decoder, x = models["cin256"].decoder, golden("cin256")["x"]
    loss = decoded(distillation_loss("l1"), decoder)
    y = x.flip(0)
    wanted = (decoder(x) - decoder(y)).abs().flatten(1).mean(1)
    torch.testing.assert_close(loss(x, y), wanted)


def test_scale_factor_comes_from_the_yaml_or_was_measured(files, tmp_path):
    """The decoder divides by it; ``scale_by_std`` leaves it in the checkpoint."""
    x = golden("cin256")["x"]
    image = load_ldm(files["cin256"]).decoder(x)
    assert relative(load_ldm(save(tmp_path / "yaml", "cin256", scale_factor=0.5)).decoder(0.5 * x), image) < 1e-12
    measured = save(tmp_path / "measured", "cin256", scale_by_std=True)
    with pytest.raises(ValueError, match="do not belong together: there is no scale_factor"):
        load_ldm(measured)
    for scale in (0.25, 0.0):
        save_checkpoint(measured / "model.ckpt", state_dict("cin256") | {"scale_factor": torch.tensor(scale)})
        if scale:
            assert relative(load_ldm(measured).decoder(scale * x), image) < 1e-12
    with pytest.raises(ValueError, match=r"scale_factor is 0\.0"):
        load_ldm(measured)


@pytest.mark.parametrize(
    ("kind", "network", "embedding", "shape"),
    [("cin256", 400_920_579, 1001 * 512, (3, 64, 64)), ("lsun_beds256", 274_056_163, 0, (3, 64, 64))],
)
def test_full_size_networks_have_the_published_parameters(kind, network, embedding, shape):
    model = read_config(GOLDEN / f"ldm_{kind}.yaml")
    with torch.device("meta"):
        function, autoencoder = model.function(), model.autoencoder(1.0)
    assert sum(p.numel() for p in function.network.parameters()) == network
    assert sum(p.numel() for p in function.parameters()) == network + embedding
    assert (model.shape, model.schedule.config()["alphas_cumprod"][0]) == (shape, 1 - 0.0015)
    assert (model.classes, model.null) == ((1000, 1000) if embedding else (None, None))
    heads = [module.heads for module in function.network.modules() if hasattr(module, "heads")]
    assert set(heads) == ({1} if embedding else {14, 21, 28})
    z = torch.zeros(1, *shape, device="meta")
    assert autoencoder.decode(z).sample.shape == (1, 3, 256, 256) and autoencoder.config.num_vq_embeddings == 8192


def test_files_are_found(files, tmp_path):
    source = files["lsun_beds256"]
    for checkpoint, document in (("model.ckpt", "any.yaml"), ("beds.ckpt", "beds.yaml"), ("last.ckpt", "config.yaml")):
        directory = tmp_path / Path(checkpoint).stem
        directory.mkdir()
        shutil.copy(source / "model.ckpt", directory / checkpoint)
        shutil.copy(source / "config.yaml", directory / document)
        if document == "beds.yaml":
            (directory / "other.yaml").write_text("nothing")
        assert load_ldm(directory).shape == (3, 8, 8) == load_ldm(directory / checkpoint).shape
    (directory / "config.yaml").rename(directory / "a.yaml")
    shutil.copy(directory / "a.yaml", directory / "b.yaml")
    with pytest.raises(ValueError, match=r"last.yaml or config.yaml or one .yaml alone, and holds a.yaml, b"):
        load_ldm(directory)
    assert load_ldm(directory, directory / "b.yaml").shape == (3, 8, 8)
    with pytest.raises(ValueError, match=r"or one .ckpt alone, and holds none"):
        load_ldm(tmp_path)
    with pytest.raises(ValueError, match=r"there is no checkpoint .*nothing.ckpt"):
        load_ldm(tmp_path / "nothing.ckpt")


def test_damaged_and_foreign_files(files, tmp_path):
    shutil.copy(files["cin256"] / "config.yaml", tmp_path)
    file, whole = tmp_path / "model.ckpt", (files["cin256"] / "model.ckpt").read_bytes()
    for content in (b"", b"PK", whole[: len(whole) // 2], whole[:-1000], b"no checkpoint at all" * 100):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"model.ckpt") as caught:
            load_ldm(tmp_path)
        assert "\n" not in str(caught.value)
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match="holds no state_dict: it is a list"):
        load_ldm(tmp_path)
    torch.save({"state_dict": {"a": torch.zeros(2)}}, file)
    with pytest.raises(ValueError, match=r"does not hold the network of .*config.yaml: .*cond_stage_model.embedding"):
        load_ldm(tmp_path)


def test_a_checkpoint_and_the_yaml_of_another(files, tmp_path):
    by_class, plain = (files[kind] for kind in ("cin256", "lsun_beds256"))
    with pytest.raises(ValueError, match=r"does not hold the network of .*cond_stage_model.embedding.weight"):
        load_ldm(plain, by_class / "config.yaml")
    with pytest.raises(ValueError, match="does not hold the network of"):
        load_ldm(by_class, plain / "config.yaml")
    (tmp_path / "wide.yaml").write_text(yaml.safe_dump(changed(f"{UNET}/model_channels", 64)))
    with pytest.raises(ValueError, match=r"conv_in.weight is torch.float64 .32, 3, 3, 3. instead of float .64, 3"):
        load_ldm(by_class, tmp_path / "wide.yaml")
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(changed(f"{UNET}/model_channels", 33)))
    with pytest.raises(ValueError, match=r"cannot build the networks of .*odd.yaml: num_channels"):
        load_ldm(by_class, tmp_path / "odd.yaml")
    weights = {k: v for k, v in state_dict("cin256").items() if "decoder.conv_in" not in k}
    torch.save({"state_dict": weights}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"does not hold the first stage of .*it lacks decoder.conv_in.bias, one of 2"):
        load_ldm(tmp_path / "model.ckpt", by_class / "config.yaml")


def test_nothing_named_in_a_file_is_imported(files, tmp_path):
    (tmp_path / "spy.py").write_text("raise SystemExit('imported')")
    document = changed("model/params/first_stage_config/params/lossconfig", {"target": "spy.Loss"})
    shutil.copy(files["cin256"] / "model.ckpt", tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(document))
    sys.path.insert(0, str(tmp_path))
    try:
        assert isinstance(load_ldm(tmp_path).function, nn.Module) and "spy" not in sys.modules
    finally:
        sys.path.remove(str(tmp_path))
