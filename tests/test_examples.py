"""The examples run as they stand, with the assertions in them."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
_spec = importlib.util.spec_from_file_location("examples_ops", EXAMPLES / "ops.py")
assert _spec and _spec.loader
ops = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ops)


@pytest.mark.parametrize("example", ops.EXAMPLES, ids=lambda e: e.__name__)
def test_op(example) -> None:
    assert torch.isfinite(example()).all()


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("[0-9]*.py")), ids=lambda path: path.stem)
def test_script(script, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    before = torch.are_deterministic_algorithms_enabled()
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        torch.use_deterministic_algorithms(before)
    assert capsys.readouterr().out
