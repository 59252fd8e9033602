"""What a scheduler's configuration says of the model: its noise schedule, what it predicts, the labels it is told.

How a scheduler steps (orders, grids of times, clipping, a terminal shift) is the solver's business, and is not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..architectures.wrappers import diffusers_class, quiet
from ..schedule import Schedule

PREDICTIONS = {"epsilon": "noise", "v_prediction": "velocity", "sample": "data", "flow_prediction": "flow"}
_LEAST = 2.0**-24  # what diffusers puts in the place of a last alpha of zero


class Process(NamedTuple):
    """A schedule, a prediction type, and the number of labels: what a flow's network is told at its noisiest."""

    schedule: Schedule
    prediction: str
    labels: int


def read_process(config: Mapping[str, Any], tokens: int) -> Process:
    """The process that a scheduler of diffusers describes, in float64; ``tokens``: of an image, for a shift by size.

    diffusers accumulates alphas_cumprod in float32; published models were trained on the float64 formula, which this
    takes. The two agree to 1e-4 relative, or the scheduler is refused. Raises ValueError for what is no variance
    preserving schedule of betas and no flow, naming what was found.
    """
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise ValueError("the scheduler's configuration names no class (_class_name); save it with save_pretrained")
    count = config.get("num_train_timesteps", 1000)
    if not isinstance(count, int) or not 2 <= count <= 10**6:
        raise ValueError(f"num_train_timesteps of {name} must lie between 2 and a million, got {count!r}")
    if name == "GASScheduler":
        raise ValueError(
            "the pipeline was saved with a learned solver (GASScheduler), which does not say how the model was "
            "trained; give the pipeline with its own scheduler"
        )
    kind = diffusers_class(name)
    try:
        with quiet():
            scheduler = kind.from_config(dict(config))
    except (TypeError, ValueError, NotImplementedError, ImportError, AttributeError) as error:
        said = str(error).partition("\n")[0]
        raise ValueError(f"diffusers does not make a {name} of its configuration: {said}") from None
    config = scheduler.config
    flow = name.startswith("FlowMatch") or config.get("use_flow_sigmas")
    said = config.get("prediction_type", "flow_prediction" if flow else "epsilon")
    if said not in PREDICTIONS:
        raise ValueError(f"{name} says prediction_type {said!r}; known: {', '.join(PREDICTIONS)}")
    for option in ("invert_sigmas", "sigma_data"):
        if config.get(option):
            raise ValueError(f"{name} has {option} = {config[option]}, which is not served; betas and flows are")
    if config.get("timestep_type") == "continuous":
        raise ValueError(f"{name} has timestep_type 'continuous': labels that are log sigma, which is not served")
    if flow:
        return Process(Schedule.flow(_shift(config, tokens)), PREDICTIONS[said], count)
    if "beta_schedule" not in config and config.get("trained_betas") is None:
        raise ValueError(f"{name} has neither betas nor a flow's sigmas, which is not served")
    alphas = alphas_cumprod(config)
    schedule = Schedule.vp_discrete(alphas)
    theirs = getattr(scheduler, "alphas_cumprod", None)
    if theirs is not None and not torch.allclose(
        theirs.double().log().clamp(min=math.log(alphas[-1])), alphas.log(), rtol=1e-3, atol=1e-4
    ):
        raise ValueError(f"{name} computes another alphas_cumprod than its configuration says, which is not served")
    return Process(schedule, PREDICTIONS[said], len(alphas))


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """prod (1 - beta) over the training times, [N] float64, of a complete configuration.

    "linear": beta even; "scaled_linear": sqrt(beta) even; "squaredcos_cap_v2": cos^2 (arXiv 2102.09672, equation 17,
    betas at most 0.999); ``trained_betas`` go before all. ``rescale_betas_zero_snr``: arXiv 2305.08891, algorithm 1,
    with 2^-24 in the place of the last zero. Raises ValueError for another schedule.
    """
    count, kind = int(config["num_train_timesteps"]), config.get("beta_schedule")
    start, end = float(config.get("beta_start", 0)), float(config.get("beta_end", 0))
    if config.get("trained_betas") is not None:
        betas = torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    elif kind == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(math.sqrt(start), math.sqrt(end), count, dtype=torch.float64).square()
    elif kind == "squaredcos_cap_v2":
        ends = torch.arange(count + 1, dtype=torch.float64) / count
        bar = torch.cos((ends + 0.008) / 1.008 * math.pi / 2).square()
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    else:
        raise ValueError(
            f"beta_schedule is {kind!r}; known: linear, scaled_linear, squaredcos_cap_v2, or trained_betas"
        )
    alphas = torch.cumprod(1 - betas, 0)
    if config.get("rescale_betas_zero_snr"):
        root = alphas.sqrt()
        alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
        alphas[-1] = _LEAST
    return alphas


def _shift(config: Mapping[str, Any], tokens: int) -> float:
    """Of a flow's times (arXiv 2403.03206, equation 23); by size it is exp(mu), mu linear in the tokens of an image."""
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift") or config.get("flow_shift") or 1.0)
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    mu = config["base_shift"] + slope * (tokens - low)
    return float(mu) if config.get("time_shift_type") == "linear" else math.exp(mu)
