"""The pages of docs/: blocks run and print what they say, commands parse, links lead somewhere, the site builds."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from pages import ROOT, blocks, commands, run, smaller

DOCS = ROOT / "docs"
PAGES = sorted(path.stem for path in DOCS.glob("*.md"))
GENERATED = {"results.md", "changelog.md"}  # docs/_build/hooks.py makes them
SAID = [(page, words) for page in PAGES for kind, text in blocks(page) if kind == "sh" for words in commands(text)]
COMMANDS = [(page, words) for page, words in SAID if words[0] != "doctor"]  # which takes no words
SHOWN = [
    page for page in PAGES if page not in ("models", "tutorial") and any(kind == "python" for kind, _ in blocks(page))
]


def printed(code: str, names: dict) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, names)
    return out.getvalue()


def test_tutorial(monkeypatch, tmp_path, no_pictures):
    """Every block, in order, in one folder and one session; a plan is made, of a small network, by --memory-budget."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mymodel", raising=False)
    monkeypatch.setattr("gas_engine.pictures.history_plot", lambda *_, **__: None)
    names: dict = {}
    for kind, text in blocks("tutorial"):
        if kind == "sh":
            for words in commands(text):
                if words[0] != "plan":
                    run(monkeypatch, smaller(words))
        elif text.startswith("# mymodel.py"):
            (tmp_path / "mymodel.py").write_text(text)
        elif kind == "python":
            shown = printed(text, names)
    assert float(shown.split()[-1]) < 1e-3  # what k-diffusion's sampler and rollout differ by
    assert {path.name for path in tmp_path.iterdir()} >= {"runs", "samples", "solver.json", "gas_solver"}


@pytest.mark.parametrize("page", SHOWN)
def test_blocks_print_what_the_page_says(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    found = blocks(page)
    for (kind, text), (following, said) in zip(found, [*found[1:], ("", "")], strict=True):
        if kind == "python":
            shown = printed(text, names)
            assert following != "text" or shown == said


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else value[0])
def test_commands_are_understood(page, words, monkeypatch):
    """The real parser takes the words, with a recipe's options before them."""
    monkeypatch.chdir(ROOT)
    verb, seen = importlib.import_module(f"gas_engine.{words[0]}"), []
    monkeypatch.setattr(verb, "run", lambda config, **_: seen.append(config))
    verb.main(words[1:])
    assert len(seen) == 1


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (DOCS / f"{page}.md").read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert target.startswith("https://") or target in GENERATED or (DOCS / target).exists(), target


def test_drawings_are_what_their_script_draws():
    diagrams = runpy.run_path(str(DOCS / "_build" / "diagrams.py"))
    for name in ("tableau", "adjoint", "memory"):
        assert (DOCS / "pictures" / f"{name}.svg").read_text() == diagrams[name]()


@pytest.mark.skipif(
    not (find_spec("mkdocs") and find_spec("material") and find_spec("mkdocstrings")),
    reason="the site needs pip install -e '.[docs]'",
)
def test_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, env=quiet,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(Path(tmp_path).rglob("*.html"))
    assert {"index.html", "tutorial.html", "results.html", "changelog.html"} <= {page.name for page in pages}
    loaded = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*\b(?:src|href)=[\"']?(https?:)?//[^>]*>")
    assert not [match[0] for page in pages for match in loaded.finditer(page.read_text())]
