"""The examples run as they stand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).parent.parent / "examples" / "ops.py"
_spec = importlib.util.spec_from_file_location("examples_ops", SOURCE)
assert _spec and _spec.loader
examples = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(examples)


@pytest.mark.parametrize("example", examples.EXAMPLES, ids=lambda e: e.__name__)
def test_example(example) -> None:
    assert torch.isfinite(example()).all()
