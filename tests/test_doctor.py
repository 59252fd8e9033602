"""The doctor tells the truth about the core, and its exit status says whether to worry."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from gas_engine import doctor
from gas_engine.ops import _native


def test_table_ends_with_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    status = doctor.main([])
    lines = capsys.readouterr().out.strip().splitlines()
    assert any("native core" in line for line in lines) and any("torch" in line for line in lines)
    report = doctor.examine()
    assert status == (0 if report["healthy"] else 1)
    assert lines[-1].split()[0] == report["verdict"].split()[0] or not report["healthy"]


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(["--json"])
    report = json.loads(capsys.readouterr().out)
    assert {"rows", "verdict", "healthy"} == set(report)
    assert {state for _, _, state in report["rows"]} <= {"ok", "note", "bad"}


def test_a_missing_core_is_bad(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("GAS_ENGINE_NATIVE", raising=False)
    monkeypatch.setitem(sys.modules, "gas_engine._native", None)
    assert doctor.main([]) == 1
    assert "GAS_ENGINE_NATIVE=off" in " ".join(capsys.readouterr().out.split())


def test_a_core_switched_off_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAS_ENGINE_NATIVE", "off")
    monkeypatch.setitem(sys.modules, "gas_engine._native", None)
    states = {subject: state for subject, _, state in doctor.examine()["rows"]}
    assert states["native core"] == "note" and states["GAS_ENGINE_NATIVE"] == "note"


def test_help_and_module() -> None:
    run = subprocess.run([sys.executable, "-m", "gas_engine.doctor", "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and "--json" in run.stdout


@pytest.mark.skipif(_native.native is None, reason="the native core is off")
def test_ops_warn_once_without_the_core() -> None:
    """A core that is missing is one warning, with the way out, and the twins run."""
    script = (
        "import sys, warnings; sys.modules['gas_engine._native'] = None\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always'); from gas_engine.ops import lincomb, _native, adjoint_step\n"
        "import torch; lincomb([torch.ones(2)], torch.ones(1))\n"
        "print(sum('pip install -e .' in str(w.message) for w in seen), _native.native)"
    )
    env = {k: v for k, v in os.environ.items() if k != "GAS_ENGINE_NATIVE"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert run.stdout.split() == ["1", "None"], run.stderr
