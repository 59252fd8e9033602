"""Fixtures: reference numbers and the small network they were computed on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pipelines import saved  # noqa: F401 (a fixture)
from runs import no_pictures, small  # noqa: F401 (fixtures)

from gas_engine import EDMDenoiser
from gas_engine.networks import build_edm
from gas_engine.testing import byte_tracker  # noqa: F401 (a fixture)

GOLDEN = Path(__file__).parent / "golden"
Arrays = dict[str, torch.Tensor]


def arrays(name: str) -> Arrays:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.as_tensor(file[key]) for key in file.files if file[key].dtype.kind in "fiu"}


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device cuDNN rounds to TF32 else, and may choose another algorithm for a rebuilt call."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Arrays]:
    return arrays


@pytest.fixture(scope="session")
def tiny() -> Callable[[float], EDMDenoiser]:
    """The reference network as a denoiser for a given t_eps."""
    arguments = json.loads((GOLDEN / "tiny_edm_ctor.json").read_text())
    network = build_edm(arguments["kwargs"], arrays("tiny_edm_state"), arguments["cls"])
    return lambda t_eps=1e-3: EDMDenoiser(network, t_eps)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, so that no process of several waits for one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What ptxas said of every CUDA source."""
    reports = [
        value for r in terminalreporter.getreports("passed") for key, value in r.user_properties if key == "ptxas"
    ]
    if reports:
        terminalreporter.section("CUDA kernels")
        for line in reports:
            terminalreporter.write_line(str(line))
