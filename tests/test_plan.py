"""The verb: a table, all plans as CSV, a picture; clear words for what does not fit."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from gas_engine import __main__, plan
from gas_engine.planner import Plans


def planned(tmp_path: Path, *options: str) -> list[dict[str, str]]:
    plan.main(["--out", str(tmp_path), *options])
    with (tmp_path / "plan.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = planned(tmp_path, "--memory-budget", "8MiB", "--steps", "4", "--batch", "16")
    said = capsys.readouterr().out
    assert "digits, batch 16, K = 4, 8.0 MiB" in said and "choice: micro-batch" in said
    assert said.count("→") == 2 and said.count("✗") == 1  # in the table and its caption
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    times = [float(row["time"]) for row in rows]
    assert times == sorted(times) and {row["blocks"] for row in rows} == {"none", "auto", "all"}
    for row in rows:
        phases = [int(row[f"{name}_bytes"]) for name in ("forward", "loss", "backward")]
        assert int(row["bytes"]) == max(phases) + int(row["weight_bytes"]) + int(row["input_bytes"])
        assert (row["feasible"] == "True") == (int(row["bytes"]) <= 8 * 2**20)
    chosen = next(row for row in rows if row["feasible"] == "True")
    assert f"choice: micro-batch {chosen['micro_batch']}," in said


def test_guidance_and_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    options = [
        "--model",
        "toy:make_guided",
        "--guidance",
        "2",
        "--weights",
        "resident",
        "nf4",
        "--steps",
        "2",
        "--batch",
        "2",
        "--evaluation-seconds",
        "2",
    ]
    rows = planned(tmp_path, *options)
    assert {(row["guidance"], row["weights"]) for row in rows} == {
        (guidance, weights) for guidance in ("joint", "split") for weights in ("resident", "nf4")
    }
    assert all(float(row["seconds"]) == pytest.approx(2 * float(row["time"]), abs=0.02) for row in rows)
    assert "guidance, 8.00 GiB" in capsys.readouterr().out


def test_a_published_network_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full size, LPIPS: 8 GiB do for CIFAR-10, with no network weights anywhere."""
    pytest.importorskip("lpips")
    pytest.importorskip("torchvision")
    seen: list[Plans] = []
    monkeypatch.setattr(plan, "as_csv", lambda plans: seen.append(plans) or "")
    plan.main(["--model", "cifar10", "--loss", "lpips", "--out", str(tmp_path)])
    chosen = seen[0].choice
    assert chosen.bytes <= 8 * 2**30 and chosen.peaks.loss > chosen.micro_batch * 2**27
    assert chosen.weight_bytes > 4 * (55_733_891 + 14_714_688)


def test_nothing_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence with the smallest there is; table, CSV and picture are there all the same."""
    with pytest.raises(SystemExit) as error:
        planned(tmp_path, "--memory-budget", "100KiB", "--steps", "2", "--batch", "2")
    assert error.value.code == 2
    words = capsys.readouterr()
    assert "no plan fits into 100.0 KiB: the smallest needs" in words.err and "allow streamed or int8" in words.err
    assert words.err.count("\n") == 1 and words.out.count("✗") > 2
    assert (tmp_path / "plan.csv").is_file() and (tmp_path / "plan.png").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--memory-budget", "0.8"], "such as 8GiB, got '0.8'"),
        (["--model", "cifar10", "--guidance", "2"], "cifar10 is not used with classifier-free guidance"),
        (["--model", "cifar"], "unknown model 'cifar'"),
        (["--steps", "0"], "steps and batch must be at least 1"),
    ],
)
def test_clear_words(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        plan.main(options)
    assert error.value.code == 2 and words in capsys.readouterr().err


def test_it_is_a_verb() -> None:
    assert "plan" in __main__.VERBS
