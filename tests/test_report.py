"""The page of a run: what it reads, that nothing in a file becomes markup, and in Chromium that it draws and moves."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import chromium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import rows, toy_trainer

from gas_engine import load_denoiser, reporting, train
from gas_engine.memory import ByteTracker, phase
from gas_engine.report import main
from gas_engine.reporting.page import as_json, page
from gas_engine.reporting.run import read_run
from gas_engine.training import course, setup
from gas_engine.training.directory import RunDirectory

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!--&amp;'\"\u2028"


class Page(HTMLParser):
    """Elements with their attributes, and the text of the data."""

    def __init__(self, text):
        super().__init__()
        self.found, self.data, self.inside = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.inside = ("id", "data") in attributes

    def handle_data(self, text):
        self.data += text if self.inside else ""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on the digits beside few classical solvers; the plan came later."""
    out = tmp_path_factory.mktemp("report") / "run <b>&one"
    patch = pytest.MonkeyPatch()
    patch.setattr(setup, "SELECTION_SEEDS", range(40_000, 40_008))
    patch.setattr(setup, "HELD_OUT_SEEDS", range(50_000, 50_016))
    patch.setattr("gas_engine.comparison.FAMILIES", {"iPNDM": ("ipndm2", "ipndm3"), "DDIM": ("euler",)})
    for name in ("image_rows", "schedule_plot", "tableau_plot", "history_plot"):
        patch.setattr(f"gas_engine.pictures.{name}", lambda *_, **__: None)
    with patch.context():
        train.main(
            ["--steps", "3", "--iterations", "6", "--batch", "4", "--train-seeds", "0-15", "--teacher.steps", "6",
             "--log-every", "2", "--evaluate-every", "3", "--logger", "none", "--out", str(out), "--device", "cpu"]
        )  # fmt: skip
    patch.undo()
    heads = "weights,blocks,graphs,trajectory,micro_batch,calls,bytes,time,seconds,feasible"
    plans = ("resident,none,3,keep,4,6,900000,9,,False", "resident,all,1,keep,4,8,400000,11,,True")
    (out / "plan.csv").write_text("".join(f"{line}\n" for line in (heads, *plans)))
    return out


@pytest.fixture(scope="module")
def browser():
    if chromium.FOUND is None:
        pytest.skip(chromium.WITHOUT)
    with chromium.Chromium() as running:
        yield running


def test_a_run_ends_with_its_page(finished):
    found = Page((finished / "report.html").read_text())
    run = json.loads(found.data)["runs"][0]
    assert (run["name"], run["family"], run["steps"], run["updates"], run["finished"]) == (
        finished.name,
        "gs",
        3,
        6,
        True,
    )
    (history,) = run["histories"]["by_steps"]
    assert [row["step"] for row in history["rows"]] == [0, 2, 3, 4, 6] and history["steps"] == 3
    written = [json.loads(line) for line in (finished / "history.jsonl").read_text().splitlines()]
    assert np.allclose([row["A"] for row in history["rows"]], [row["A"] for row in written], rtol=1e-5)
    alpha, sigma, _ = load_denoiser("digits").schedule(torch.tensor(written[-1]["times"]))
    assert np.allclose(history["rows"][-1]["levels"], sigma / alpha, rtol=1e-4)
    assert set(history["grids"]) == {"logSNR", "uniform", "quadratic", "karras"}
    assert run["metrics"]["loss"]["steps"] == [row["step"] for row in rows(finished) if "loss" in row]
    assert run["comparison"]["rows"][0][0] == "learned (gs)" and len(run["comparison"]["rows"]) == 4
    assert [row["name"] for row in run["samples"]["rows"]][:2] == ["teacher", "learned (gs)"]
    assert [len(row["errors"]) for row in run["samples"]["rows"]] == [0, 16, 16]
    assert run["plan"] == {"missing": "No memory budget was given (--memory-budget 8GiB), so nothing was planned."}


def test_memory_over_an_update_is_that_of_a_tracker(finished):
    """The highest reading is the peak; states, the network and the loss are all seen."""
    read = read_run(finished)["memory"]
    assert {"states", "network", "loss", "optimiser"} <= set(read["bytes"]) and len(
        read["operation"]
    ) <= course.READINGS
    assert (
        read["operation"] == sorted(read["operation"])
        and max(read["bytes"]["network"]) > max(read["bytes"]["states"]) > 0
    )


@pytest.mark.parametrize("readings", [1, 2, 7, 10_000])
def test_a_timeline_ends_at_the_peak_and_is_bounded(readings):
    kept = []
    with ByteTracker(readings=readings) as tracker:
        for size in (3, 50, 7, 20, 1, 9):
            with phase("states"):
                kept = [*kept[-1:], torch.zeros(size, 256)]
    assert len(tracker.timeline) <= readings
    assert max(reading.live for reading in tracker.timeline) == tracker.peak == (50 + 7 + 20) * 1024
    assert all(reading.by_phase == {"states": reading.live} for reading in tracker.timeline)


def test_the_watched_update_is_the_update(tmp_path):
    """Losses, gradients' effect and averages to the bit; nothing is written of the second."""
    watched, plain = toy_trainer(), toy_trainer()
    directory = RunDirectory(tmp_path)
    for _ in range(3):
        assert torch.equal(course.update(watched, directory), plain.update())
    for one, other in ((watched.solver, plain.solver), (watched.average, plain.average)):
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["memory.csv"]


def test_nothing_is_fetched_and_nothing_in_a_file_is_markup(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads((run / "config.json").read_text()) | {"model": HOSTILE, HOSTILE: HOSTILE}
    (run / "config.json").write_text(json.dumps(config))
    table = (run / "comparison.csv").read_text()
    (run / "comparison.csv").write_text(table.replace("iPNDM", '"' + HOSTILE.replace('"', '""') + '"'))
    text = page([read_run(run), read_run(finished)])
    found = Page(text)
    kinds = [tag for tag, _ in found.found]
    assert kinds.count("script") == 2 and "img" not in kinds and "b" not in kinds and "iframe" not in kinds
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|url\(["']?http|@import""", text)
    assert all(
        not attributes.get(name, "").startswith("http") for _, attributes in found.found for name in ("src", "href")
    )
    read = json.loads(found.data)["runs"][0]
    assert read["model"] == HOSTILE and read["options"][HOSTILE] == HOSTILE


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
    )
)
def test_json_comes_back_and_is_no_markup(value):
    text = as_json(value)
    assert not set("<>&") & set(text)
    assert (
        json.dumps(json.loads(text)) == re.sub("NaN|-?Infinity", "null", json.dumps(value))
        or "N" in str(value)
        or "I" in str(value)
    )


def test_every_part_may_be_missing_or_damaged(finished, tmp_path):
    names = [
        "history.jsonl",
        "metrics.jsonl",
        "comparison.csv",
        "memory.csv",
        "plan.csv",
        "held_out.safetensors",
        "solver.safetensors",
    ]
    for content in (None, b"", b"\xff\xfe{]", b'{"step": "x"}\n{"step": 1}\n', b"a,b\n1\n"):
        run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        run.mkdir()
        shutil.copy(finished / "config.json", run)
        for name in names if content is not None else []:
            (run / name).write_bytes(content)
        read = read_run(run)
        for part in ("histories", "metrics", "comparison", "memory", "plan", "samples", "evaluation", "solver"):
            if "columns" in read[part]:  # anything is a table of one column
                continue
            assert set(read[part]) == {"missing"} and read[part]["missing"].endswith("."), (content, part, read[part])
        reporting.write_page(run / "report.html", [read])


def test_a_run_that_is_being_written(finished, tmp_path):
    """The last line of a file may be half there, and there may be no solver yet: times without noise levels."""
    shutil.copy(finished / "config.json", tmp_path)
    for name in ("history.jsonl", "metrics.jsonl"):
        (tmp_path / name).write_text((finished / name).read_text()[:-20])
    read = read_run(tmp_path)
    (history,) = read["histories"]["by_steps"]
    assert [row["step"] for row in history["rows"]] == [0, 2, 3, 4] and history["grids"] == {}
    assert not read["finished"] and "missing" in read["samples"]


@pytest.mark.parametrize(
    ("shape", "kind"), [((1, 8, 8), "png"), ((3, 32, 32), "png"), ((3, 200, 200), "jpeg"), ((2, 5, 7), "png")]
)
def test_samples_and_their_errors(tmp_path, shape, kind):
    teacher = torch.rand(30, *shape) * 2 - 1
    student = teacher + 0.25
    student[:, :, 0, 0] = teacher[:, :, 0, 0]
    reporting.save_samples(tmp_path / "s.safetensors", [("teacher", ""), ("ours", "")], [teacher, student])
    from gas_engine.reporting.pictures import read_samples

    read = read_samples(tmp_path / "s.safetensors")
    assert 20 <= read["count"] <= 24 and read["top"] == pytest.approx(0.25, rel=1e-4)
    assert read["rows"][1]["images"][0].startswith(f"data:image/{kind};base64,")
    if kind == "png":
        import base64
        import io

        error = np.asarray(Image.open(io.BytesIO(base64.b64decode(read["rows"][1]["errors"][5].partition(",")[2]))))
        assert error.shape == shape[1:] and error[0, 0] == 0 and (error.ravel()[1:] == 255).all()


@pytest.mark.parametrize(
    ("given_", "said"),
    [([], "name at least one run"), (["{}/none"], "is no run directory"), (["{}", "{}"], "give --out"),
     (["{}", "--out", "{}"], "is a directory")],
)  # fmt: skip
def test_refusals(given_, said, finished, capsys):
    with pytest.raises(SystemExit) as error:
        main([word.format(finished) for word in given_])
    assert error.value.code == 2
    assert said in (sentence := capsys.readouterr().err) and sentence.count("\n") == 1


@pytest.fixture(scope="module")
def pages(finished, tmp_path_factory):
    """One run, and two of which one is not finished."""
    folder = tmp_path_factory.mktemp("pages")
    part = folder / "part"
    part.mkdir()
    shutil.copy(finished / "config.json", part)
    main([str(finished), "--out", str(folder / "one.html")])
    main([str(finished), str(part), "--out", str(folder / "two.html")])
    return folder


def test_several_k_are_compared_each_with_its_own(browser, finished, tmp_path):
    """The classical solver of most evaluations, the nearest of all, is not what the fewest are held against."""
    run = tmp_path / "any"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("checkpoints"))
    (run / "comparison.csv").write_text(
        'solver,setting,l1\nlearned (gs),"K = 4, 9 updates",0.2\niPNDM,"K = 4, ipndm2, quadratic, 0.001",0.3\n'
        'learned (gs),"K = 5, 9 updates",0.04\nDDIM,"K = 5, euler, uniform, 0.001",0.1\nteacher,20,0\n'
    )
    main([str(run), "--out", str(tmp_path / "any.html")])
    browser.errors.clear()
    browser.open(tmp_path / "any.html", 1280)
    assert "With 4 evaluations its samples are 1.5 times nearer" in browser.ask(
        "document.querySelector('.lead').textContent"
    )
    cells = browser.ask(
        "[...document.querySelectorAll('#comparison tbody td:last-child')].map((c) => c.textContent).join()"
    )
    assert cells == "1.00×,1.50×,1.00×,2.50×,–"
    assert browser.ask("document.querySelectorAll('#comparison tr.ours').length") == 2 and browser.errors == []


@pytest.mark.parametrize(
    ("name", "width", "dark"), [("one", 1280, False), ("one", 390, True), ("two", 390, False), ("two", 1280, True)]
)
def test_in_chromium(browser, pages, tmp_path, name, width, dark):
    browser.errors.clear()
    browser.open(pages / f"{name}.html", width, dark)
    assert browser.ask("document.documentElement.scrollWidth <= innerWidth")
    assert browser.ask("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    picture = np.asarray(Image.open(browser.picture(tmp_path / "page.png")).convert("L"))
    assert (np.median(picture) < 60) == dark and picture.std() > 8
    browser.ask("document.getElementById('theme').click()")
    assert browser.ask("document.documentElement.dataset.theme") == ("light" if dark else "dark")
    browser.ask("document.getElementById('theme').click()")
    if name == "two":
        browser.ask("document.querySelectorAll('#runs input')[1].click()")
        assert browser.ask("document.querySelectorAll('#learned .missing, #samples .missing').length") == 2
    assert browser.errors == []


def test_the_slider_moves_the_drawing_and_samples_are_enlarged(browser, pages):
    browser.errors.clear()
    browser.open(pages / "one.html", 1280)
    drawing = "document.querySelector('#learned .quad').innerHTML + document.querySelector('#learned .pair').innerHTML"
    last, said = browser.ask(drawing), browser.ask("document.querySelector('.scrub output').textContent")
    browser.ask("document.getElementById('training').focus()")
    browser.key("Home", 36)
    first = browser.ask(drawing)
    now = browser.ask("document.querySelector('.scrub output').textContent")
    assert first != last and (said, now) == ("update 6 of 6", "update 0 of 6")
    browser.key("End", 35)
    assert browser.ask(drawing) == last
    browser.ask("document.querySelector('.tile').click()")
    assert browser.ask("document.querySelector('dialog').open && document.querySelectorAll('dialog .lens').length") == 5
    browser.key("ArrowRight", 39)
    assert browser.ask("document.querySelector('dialog h2').textContent") == "seed 50001"
    browser.ask("document.querySelectorAll('#samples .pills input')[1].click()")
    assert browser.ask("document.querySelectorAll('#samples img.error').length") == 32
    assert browser.errors == []
