"""The YAML of latent diffusion: what is not understood is refused in one sentence, and nothing it names is imported."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from latent import FIRST, UNET, changed, settings

from gas_engine import Schedule
from gas_engine.adapters._ldm_config import read_config


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("model/target", "os.system", r"model is 'os.system', which is not understood; ldm.models.diffusion.ddpm"),
        ("model/target", "ldm.models.diffusion.ddpm.LatentUpscaleDiffusion", "which is not understood"),
        ("model/params/first_stage_config/target", "ldm.models.autoencoder.AutoencoderKL", "VQModelInterface is$"),
        ("model/params/cond_stage_config/target", "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "diffusers direc"),
        ("model/params/cond_stage_config", "__is_first_stage__", "cond_stage_config is '__is_first_stage__'"),
        ("model/params/conditioning_key", "concat", "conditioning_key is 'concat'; understood is crossattn"),
        ("model/params/timesteps", 0, "timesteps must be a whole number from 1 to 100000, got 0"),
        ("model/params/beta_schedule", "cosine", "beta_schedule is 'cosine'; understood is linear"),
        ("model/params/linear_end", 0.001, "must rise between 0 and 1, got 0.0015 and 0.001"),
        ("model/params/linear_start", "low", "linear_start must be a positive number, got 'low'"),
        ("model/params/parameterization", [1], r"parameterization is \[1\]; understood are eps, x0, v"),
        ("model/params/parameterization", "score", "parameterization is 'score'; understood are eps, x0, v"),
        ("model/params/channels", 4, "the 4 channels of the latents, but takes 3 and gives 3"),
        (f"{UNET}/model_channels", 10**9, "model_channels must be a whole number from 1 to 8192, got 1000000000"),
        (f"{UNET}/channel_mult", 3, "channel_mult must be a list of 1 to 8 numbers, got 3"),
        (f"{UNET}/use_scale_shift_norm", True, "use_scale_shift_norm: True; understood is False"),
        (f"{UNET}/super_attention", 1, "a setting 'super_attention', which is not understood"),
        (f"{UNET}/num_head_channels", 24, "heads 24 wide do not divide a level of 32 channels"),
        (f"{UNET}/context_dim", 99, "context_dim 99 .* does not fit classes of width 16"),
        (f"{FIRST}/ddconfig", None, "ddconfig is None"),
        (f"{FIRST}/n_embed", True, "n_embed must be a whole number from 1 to 16777216, got True"),
        ("model/params", None, "model has no params"),
        ("model", 7, "model is 7, which is not understood"),
    ],
)  # fmt: skip
def test_settings_that_are_not_understood(path, value, said, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(changed(path, value)))
    with pytest.raises(ValueError, match=said) as caught:
        read_config(tmp_path / "config.yaml")
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_other_refusals_of_yamls(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(changed(f"{UNET}/num_head_channels", -1, "lsun_beds256")))
    with pytest.raises(ValueError, match=r"num_heads must be|lacks the setting 'num_heads'"):
        read_config(file)
    file.write_text(yaml.safe_dump(changed(f"{FIRST}/ddconfig/attn_resolutions", [32])))
    with pytest.raises(ValueError, match="first stages with attn_resolutions"):
        read_config(file)
    for text in ("a: [", "!!python/object/apply:os.system ['exit 3']", "- 1", "", "\0", "[" * 5000):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"config.yaml") as caught:
            read_config(file)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ValueError, match="pip install pyyaml"):
        read_config(file)


def paths(section: Any, prefix: str = "") -> list[str]:
    if not isinstance(section, dict):
        return []
    return [f"{prefix}{key}" for key in section] + [p for k, v in section.items() for p in paths(v, f"{prefix}{k}/")]


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3)
)


@hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["cin256", "lsun_beds256"]), value=values)
def test_any_value_of_any_setting_is_read_or_refused(data, kind, value, tmp_path):
    document = changed(data.draw(st.sampled_from(paths(settings(kind)))), value, kind)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(document))
    try:
        assert isinstance(read_config(tmp_path / "config.yaml").schedule, Schedule)
    except ValueError as error:
        assert str(tmp_path) in str(error) and "\n" not in str(error)
