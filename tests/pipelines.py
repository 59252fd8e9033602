"""Small pipelines of diffusers with random weights: the real classes, saved in the real format, built without network.

`saved("sdxl")` (a fixture) is the directory of one; `PIPELINES` has all of them. States are [4, 8, 8], images
[3, 16, 16]; texts have at most 16 tokens for CLIP.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = ["a", "an", "the", "of", "on", "in", "photo", "cat", "dog", "tree", "red", "blue", "house", "painting", "small"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.!?'"
LENGTH = 16  # tokens of a text for CLIP
WIDTH = 16  # of every text encoder
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DIT_BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of the pipeline of a name, written once in a test session."""
    pytest.importorskip("diffusers", reason="needs diffusers: pip install diffusers")
    pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    root = tmp_path_factory.mktemp("pipelines")

    def path(name: str) -> Path:
        if not (root / name).exists():
            save(name, root / name)
        return root / name

    return path


def save(name: str, path: Path) -> None:
    built = build(name)
    built.save_pretrained(path)
    if name == "dit":  # the published files keep the classes' names beside the modules
        index = json.loads((path / "model_index.json").read_text())
        index["id2label"] = {"0": "tench, Tinca tinca", "1": "goldfish, Carassius auratus", "207": "golden retriever"}
        (path / "model_index.json").write_text(json.dumps(index, indent=2))


def build(name: str) -> Any:
    """The pipeline of a name, in eval mode; the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PIPELINES[name]()


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    pieces = [*LETTERS, *(letter + "</w>" for letter in LETTERS)]
    merges = []
    for word in WORDS:
        left = word[0]
        for n, letter in enumerate(word[1:], 2):
            right = letter + "</w>" * (n == len(word))
            merges.append((left, right))
            left += right
            pieces.append(left)
    # The end of text has the highest index, as in the published vocabulary: encoders find it by that.
    vocabulary = {piece: n for n, piece in enumerate(dict.fromkeys(pieces))}
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    return CLIPTokenizer(vocab=vocabulary, merges=list(dict.fromkeys(merges)), model_max_length=LENGTH)


def _clip(projected: bool, **config: Any) -> tuple[Any, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = _clip_tokenizer()
    settings = {
        "hidden_size": WIDTH, "projection_dim": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": LENGTH, "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 1,
    }  # fmt: skip
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return tokenizer, kind(CLIPTextConfig(**{**settings, **config})).eval()


def _t5(width: int = WIDTH) -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "▁", *("▁" + word for word in WORDS), *LETTERS]
    tokenizer = T5TokenizerFast(
        vocab=[(piece, -float(n)) for n, piece in enumerate(pieces)], extra_ids=0, model_max_length=512
    )
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=2 * WIDTH, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return tokenizer, T5EncoderModel(config).eval()


def _vae(**config: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, latent_channels=4, sample_size=16, **config,
    ).eval()  # fmt: skip


def _unet(**config: Any) -> Any:
    from diffusers import UNet2DConditionModel

    settings = {
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 2, "cross_attention_dim": WIDTH,
    }  # fmt: skip
    return UNet2DConditionModel(**{**settings, **config}).eval()


def _stable_diffusion(scheduler: Any, **config: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    tokenizer, encoder = _clip(projected=False)
    return StableDiffusionPipeline(
        vae=_vae(), text_encoder=encoder, tokenizer=tokenizer, unet=_unet(**config), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sd15() -> Any:
    """Stable Diffusion 1.5: noise prediction."""
    from diffusers import PNDMScheduler

    return _stable_diffusion(PNDMScheduler(**SD_BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1))


def _sd21v() -> Any:
    """Stable Diffusion 2.1: velocity prediction, linear projections."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        **SD_BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    return _stable_diffusion(scheduler, use_linear_projection=True)


def _sdxl() -> Any:
    """Stable Diffusion XL: two encoders, a pooled text and the sizes of the image."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer, encoder = _clip(projected=False)
    tokenizer_2, encoder_2 = _clip(projected=True, hidden_act="gelu")
    unet = _unet(
        cross_attention_dim=2 * WIDTH, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=_vae(scaling_factor=0.13025), text_encoder=encoder, text_encoder_2=encoder_2, tokenizer=tokenizer,
        tokenizer_2=tokenizer_2, unet=unet, force_zeros_for_empty_prompt=True,
        scheduler=EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1),
    )  # fmt: skip


def _sd3() -> Any:
    """Stable Diffusion 3: three encoders, flow matching with shift 3."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer, encoder = _clip(projected=True)
    tokenizer_2, encoder_2 = _clip(projected=True, hidden_act="gelu")
    tokenizer_3, encoder_3 = _t5(2 * WIDTH)  # the texts of CLIP side by side are as wide
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=2 * WIDTH, caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=8,
    ).eval()  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer,
        vae=_vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=encoder, text_encoder_2=encoder_2, text_encoder_3=encoder_3, tokenizer=tokenizer,
        tokenizer_2=tokenizer_2, tokenizer_3=tokenizer_3, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def _flux(guided: bool) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer, encoder = _clip(projected=False)
    tokenizer_2, encoder_2 = _t5()
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=guided, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0 if guided else 1.0, use_dynamic_shifting=guided, base_shift=0.5, max_shift=1.15,
        base_image_seq_len=256, max_image_seq_len=4096,
    )  # fmt: skip
    return FluxPipeline(
        scheduler=scheduler,
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=encoder, tokenizer=tokenizer, text_encoder_2=encoder_2, tokenizer_2=tokenizer_2,
        transformer=transformer,
    )  # fmt: skip


def _dit() -> Any:
    """DiT: classes, and a learned variance beside the noise."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    scheduler = DDIMScheduler(**DIT_BETAS, clip_sample=False, set_alpha_to_one=True)
    return DiTPipeline(transformer=transformer, vae=_vae(), scheduler=scheduler)


def _pixart() -> Any:
    """PixArt-alpha: T5 with a mask, and a learned variance beside the noise."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    tokenizer, encoder = _t5()
    transformer = PixArtTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        cross_attention_dim=16, caption_channels=WIDTH,
    ).eval()  # fmt: skip
    return PixArtAlphaPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=_vae(), transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(**DIT_BETAS),
    )  # fmt: skip


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd15": _sd15,
    "sd21v": _sd21v,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": lambda: _flux(guided=True),
    "flux_schnell": lambda: _flux(guided=False),
    "dit": _dit,
    "pixart": _pixart,
}
