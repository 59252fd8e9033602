"""What a saved pipeline says: schedules, shapes, autoencoders, networks that nothing here knows by name; bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gas_engine import Schedule
from gas_engine.adapters._diffusers_named import NamedFunction
from gas_engine.adapters._diffusers_networks import function_of, shape_of
from gas_engine.adapters._diffusers_schedulers import read_process
from gas_engine.adapters.diffusers import LazyVAE, load_diffusers
from gas_engine.losses import distillation_loss
from gas_engine.losses.decoders import decoded
from gas_engine.pictures import can_draw

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
Saved = Callable[[str], Path]
TRAINED = torch.linspace(0.001, 0.03, 50).tolist()
SD = pipelines.SD_BETAS


def config_of(scheduler: Any) -> dict[str, Any]:
    return json.loads(scheduler.to_json_string())


@pytest.mark.parametrize(
    "scheduler, tolerance",
    [
        (diffusers.DDPMScheduler(), 1e-6),
        (diffusers.PNDMScheduler(**SD), 1e-6),
        (diffusers.EulerDiscreteScheduler(**SD, use_karras_sigmas=True), 1e-6),
        (diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2"), 1e-4),
        (diffusers.UniPCMultistepScheduler(trained_betas=TRAINED), 1e-6),
        (diffusers.DDIMScheduler(num_train_timesteps=50), 1e-6),
        (diffusers.DPMSolverMultistepScheduler(**SD, rescale_betas_zero_snr=True), 1e-4),
    ],
    ids=["linear", "scaled", "karras", "cosine", "trained", "50", "zero snr"],
)
def test_alphas_are_the_schedulers(scheduler: Any, tolerance: float) -> None:
    """Theirs are float32; the steepest ends, betas of 0.999 and an alpha of zero, lose some digits more."""
    schedule, prediction, labels = read_process(config_of(scheduler), 16)
    ours = torch.tensor(schedule.parameters["alphas_cumprod"], dtype=torch.float64).sqrt()
    assert prediction == "noise" and labels == len(ours)
    torch.testing.assert_close(scheduler.alphas_cumprod.double().sqrt(), ours, rtol=tolerance, atol=1e-12)


def test_zero_snr_ends_as_diffusers_has_it() -> None:
    scheduler = diffusers.DDIMScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert scheduler.alphas_cumprod[-1] == 0  # in DDIM; other schedulers put 2^-24 there
    schedule, prediction, _ = read_process(config_of(scheduler), 16)
    assert float(schedule.alpha(1.0)) == pytest.approx(2.0**-12) and prediction == "velocity"


@pytest.mark.parametrize("kind", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_shift_of_a_flow(kind: str) -> None:
    scheduler = getattr(diffusers, kind)(shift=3.0)
    schedule, prediction, labels = read_process(config_of(scheduler), 16)
    assert (schedule, prediction, labels) == (Schedule.flow(3.0), "flow", 1000)
    times = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    torch.testing.assert_close(schedule.sigma(times), scheduler.sigmas[:1000].double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_shift_by_size(kind: str, tokens: int) -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind, shift=7.0)
    schedule, _, _ = read_process(config_of(scheduler), tokens)
    sigmas = torch.linspace(1, 0.1, 7, dtype=torch.float64)
    scheduler.set_timesteps(sigmas=sigmas.tolist(), mu=calculate_shift(tokens))
    torch.testing.assert_close(schedule.sigma(sigmas), scheduler.sigmas[:-1].double(), rtol=1e-6, atol=0)


def test_flows_of_multistep_schedulers() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    )
    assert read_process(config_of(scheduler), 16)[:2] == (Schedule.flow(3.0), "flow")


@pytest.mark.parametrize(
    "config, words",
    [
        (config_of(diffusers.EDMEulerScheduler()), "EDMEulerScheduler has sigma_data = 0.5, which is not served"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "wavy"}, "wavy is not implemented"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}, "'sigmoid'; known: linear, scaled_linear"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "score"}, "'score'; known: epsilon"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": 10**12}, "between 2 and a million"),
        ({"_class_name": "DDIMScheduler", "beta_end": 2.0}, "fall strictly"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, "has sigma_data = 0.5"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "neither betas nor a flow"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "'continuous'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas"),
        ({"_class_name": "NoScheduler"}, "has no NoScheduler"),
        ({}, "names no class"),
    ],
)
def test_schedulers_that_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_process(config, 16)


def test_shapes() -> None:
    small = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
    flux = diffusers.FluxTransformer2DModel(
        **small, num_single_layers=1, axes_dims_rope=(4, 6, 6), joint_attention_dim=8, pooled_projection_dim=8
    )
    assert shape_of(flux, 8, None) == (16, 128, 128) and shape_of(flux, 8, 512) == (16, 64, 64)
    with pytest.raises(ValueError, match="multiple of 16 pixels, got 520"):
        shape_of(flux, 8, 520)
    wide = diffusers.DiTTransformer2DModel(**small, sample_size=32, in_channels=9, out_channels=4, norm_num_groups=2)
    with pytest.raises(ValueError, match="takes 9 channels and returns 4: its 'in_channels'"):
        shape_of(wide, 8, None)


def test_pixart_is_told_its_size() -> None:
    torch.manual_seed(0)
    network = diffusers.PixArtTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, caption_channels=8,
        sample_size=8, use_additional_conditions=True,
    ).eval()  # fmt: skip
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)
    sizes = {"resolution": torch.tensor([[64.0, 64.0]]), "aspect_ratio": torch.ones(1, 1)}
    schedule = read_process(config_of(diffusers.DDIMScheduler()), 16).schedule
    ours = function_of(network, schedule, 1000)(x, torch.tensor(0.501, dtype=torch.float64), {"text": text, **sizes})
    added = {"resolution": torch.tensor([[64.0, 64.0]] * 2), "aspect_ratio": torch.ones(2, 1)}
    theirs = network(x, text, torch.full((2,), 500), added).sample.chunk(2, 1)[0]
    torch.testing.assert_close(ours, theirs)


def test_an_unconditional_pipeline_and_its_network_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    scheduler = diffusers.DDPMScheduler(prediction_type="sample")
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(tmp_path)
    x = torch.randn(2, 3, 8, 8)
    for name in (str(tmp_path), str(tmp_path / "unet")):
        denoiser = load_diffusers(name)
        assert (denoiser.shape, denoiser.prediction, denoiser.decoder) == ((3, 8, 8), "data", None)
        ours = denoiser(x, torch.tensor(0.501, dtype=torch.float64))
        torch.testing.assert_close(ours, network(x, 500).sample, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="multiple of 2 pixels, got 9"):
        load_diffusers(str(tmp_path), resolution=9)


def test_a_network_without_a_wrapper_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=6,
        patch_size=1, timestep_scale=0.5,
    ).eval()  # fmt: skip
    network.save_pretrained(tmp_path / "transformer")
    flow = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    diffusers.DPMSolverMultistepScheduler(**flow).save_pretrained(tmp_path / "scheduler")
    denoiser = load_diffusers(str(tmp_path / "transformer"))
    x, text, mask = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 6), torch.ones(2, 5)
    sigma = float(denoiser.schedule.sigma(0.4))
    theirs = network(x, text, torch.full((2,), 500 * sigma), encoder_attention_mask=mask).sample
    t = torch.tensor(0.4, dtype=torch.float64)
    for cond in (
        {"text": text, "mask": mask},
        {"encoder_hidden_states": text, "encoder_attention_mask": mask[:1]},
    ):
        torch.testing.assert_close(denoiser(x, t, cond), theirs)
    with pytest.raises(ValueError, match="SanaTransformer2DModel takes no 'pooled_projections'; it takes encoder_hid"):
        denoiser(x, t, {"text": text, "pooled": text[:, 0]})
    with pytest.raises(ValueError, match="needs 'encoder_hidden_states' in its condition, which has nothing"):
        denoiser(x, t)


def test_a_network_that_rounds_its_label_is_refused_in_bfloat16() -> None:
    from diffusers.models.embeddings import Timesteps

    class Rounding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sines, self.out = Timesteps(8, True, 0), nn.Linear(8, 4)

        dtype = property(lambda self: self.out.weight.dtype)

        def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
            sines = self.sines(timestep.to(hidden_states.dtype)).to(hidden_states.dtype)
            return (hidden_states + self.out(sines)[:, :, None, None],)

    function = NamedFunction(Rounding(), Schedule.flow())
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(0.9002, dtype=torch.float64)
    assert function(x, t, None).dtype == torch.float32
    with pytest.raises(ValueError, match=r"Rounding rounds its time label to bfloat16, .* run it in float32"):
        function.to(torch.bfloat16)(x, t, None)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_the_autoencoder_is_read_when_it_is_used(saved: Saved, name: str) -> None:
    denoiser, pipe, z = load_diffusers(str(saved(name))), pipelines.build(name), torch.randn(2, 4, 8, 8)
    decoder, config = denoiser.decoder, pipe.vae.config
    assert isinstance(decoder, LazyVAE) and not decoder._modules
    expected = pipe.vae.decode(z / config.scaling_factor + (config.shift_factor or 0)).sample
    torch.testing.assert_close(decoder(z), expected)
    torch.testing.assert_close(decoder(z.bfloat16()), expected, rtol=0.1, atol=0.1)
    assert next(decoder.parameters()).dtype == torch.float32 and not any(p.requires_grad for p in decoder.parameters())


def test_latents_of_another_scale_are_refused(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved("sd15"), tmp_path / "p")
    _config(tmp_path / "p/vae", latents_mean=[0.0] * 4)
    decoder = load_diffusers(str(tmp_path / "p")).decoder
    with pytest.raises(ValueError, match="AutoencoderKL has latents_mean: latents of another scale"):
        decoder(torch.zeros(1, 4, 8, 8))


def test_an_autoencoder_that_is_not_there_is_missed_before_the_work(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved("sd15"), tmp_path / "p")
    (tmp_path / "p/vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot read the vae of"):
        can_draw(load_diffusers(str(tmp_path / "p")))


def test_a_loss_in_pixels_looks_into_the_autoencoder(saved: Saved) -> None:
    decoder = load_diffusers(str(saved("sd15"))).decoder
    assert isinstance(decoder, LazyVAE)
    loss = decoded(distillation_loss("l1"), decoder)
    x, y = torch.randn(2, 1, 4, 8, 8).unbind()
    torch.testing.assert_close(loss(x, y), (decoder(x) - decoder(y)).abs().mean((1, 2, 3)))
    assert loss.weight_bytes == sum(p.nbytes for p in decoder.parameters())


def test_dtype_and_blocks_of_one_embedding(saved: Saved) -> None:
    denoiser = load_diffusers(str(saved("dit")), dtype=torch.bfloat16)
    assert {p.dtype for p in denoiser.parameters()} == {torch.bfloat16}
    assert denoiser.classes == 1000 and denoiser.conditioning.null.tolist() == [1000]


def test_a_name_that_is_no_directory_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"cannot read model_index.json of nobody/nothing: "):
        load_diffusers("nobody/nothing")


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_the_class_that_published_transformers_are_saved_under(saved: Saved, tmp_path: Path, name: str) -> None:
    shutil.copytree(saved(name), tmp_path / "p")
    _index(tmp_path / "p", transformer=["diffusers", "Transformer2DModel"])
    _config(tmp_path / "p/transformer", _class_name="Transformer2DModel")
    functions = [load_diffusers(str(path)).function for path in (saved(name), tmp_path / "p")]
    assert type(functions[0]) is type(functions[1])


def _without(path: Path, part: str) -> None:
    shutil.rmtree(path / part)


def _index(path: Path, **entries: Any) -> None:
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | entries))


def _config(path: Path, **entries: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | entries))


def _drop(path: Path, tensor: str) -> None:
    tensors = load_file(path)
    del tensors[tensor]
    save_file(tensors, path, {"format": "pt"})


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda p: (p / WEIGHTS).rename(p / "unet/diffusion_pytorch_model.bin"), "is a pickle .* save it again with"),
        (lambda p: (p / WEIGHTS).unlink(), "cannot read the unet of"),
        (lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:5000]), "cannot read the unet of"),
        (lambda p: (p / "unet/config.json").write_text("{"), "cannot read the unet"),
        (lambda p: _without(p, "scheduler"), "cannot read the scheduler's configuration of"),
        (lambda p: _config(p / "unet", layers_per_block=2), "loading state_dict for UNet2DConditionModel: size mis"),
        (lambda p: _drop(p / WEIGHTS, "conv_out.bias"), "lacks 1 of its tensors, 'conv_out.bias'"),
        (lambda p: _config(p / "unet", time_cond_proj_dim=8), "lacks|takes 'timestep_cond'"),
        (lambda p: _index(p, unet=["my_code", "Net"]), "Net of 'my_code', code that is not run"),
        (lambda p: _index(p, unet=["diffusers", "DDIMScheduler"]), "which is no network"),
        (lambda p: _index(p, unet=[None, None]), "has none of unet, transformer"),
        (lambda p: _index(p, unet_2=["diffusers", "UNet2DModel"]), "has unet and unet_2; a model of exactly one"),
        (lambda p: _index(p, controlnet=["diffusers", "ControlNetModel"]), "'controlnet', which its denoiser waits"),
        (lambda p: (p / "model_index.json").write_text("[]"), "it is a list, not an object of settings"),
        (lambda p: (p / "model_index.json").unlink(), "neither model_index.json nor config.json"),
    ],
)
def test_spoilt_pipelines_are_refused_in_a_sentence(
    saved: Saved, tmp_path: Path, spoil: Callable[[Path], Any], words: str
) -> None:
    shutil.copytree(saved("sd15"), tmp_path / "p")
    spoil(tmp_path / "p")
    with pytest.raises(ValueError, match=words) as caught:
        load_diffusers(str(tmp_path / "p"))
    assert "\n" not in str(caught.value)
