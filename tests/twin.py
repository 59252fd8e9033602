"""Twins written from the mathematics, with none of the library's machinery: a plain autograd sampling loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gas_engine import Denoiser, Schedule, Tableau


def plain_rollout(denoiser: Denoiser, x: Tensor, tableau: Tableau, cond: Any = None) -> Tensor:
    """x[n+1] = sum A x + B F by ordinary autograd; keeps everything."""
    tableau = tableau if tableau.prediction is None else tableau.fold(denoiser.prediction)
    states, outputs = [x], []
    for n in range(tableau.steps):
        scaled = tableau.c_in[n].to(x.dtype) * states[n]
        outputs.append(denoiser(scaled, tableau.t_net[n], cond))
        new = torch.zeros_like(x)
        for j in range(n + 1):
            new = new + tableau.A[n, j].to(x.dtype) * states[j] + tableau.B[n, j].to(x.dtype) * outputs[j]
        states.append(new)
    return states[-1]


def noise_from_output(prediction: str, x: Tensor, output: Tensor, schedule: Schedule, told: Tensor) -> Tensor:
    """The noise estimate of a network of any prediction type, at the time it was told."""
    alpha, sigma, _ = schedule(told)
    return {
        "noise": output,
        "data": (x - alpha * output) / sigma,
        "velocity": alpha * output + sigma * x,
        "flow": x + alpha * output,
    }[prediction]


def relative(got: Tensor, wanted: Any) -> float:
    """Relative L2 error."""
    wanted = torch.as_tensor(wanted).detach()
    return float((got.detach().double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-300))
