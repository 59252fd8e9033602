"""What the site shows of the repository beside docs/: examples as pages, the changelog, results, pictures.

Links of pages are relative to their place in the repository, so that they work there as well; `on_page_markdown` turns
those that lead out of docs/ to what stands for them here.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(\]\()([^)#\s]+)")
LATER = "# Results\n\n`make experiments` writes `experiments/RESULTS.md`, which is shown here; it has not been run in this tree.\n"


def as_page(source: str) -> str:
    """A script in cells, `# %%`, as Markdown: cells of comments are text, the module's docstring the introduction."""
    docstring, rest = re.match(r'(?:#[^\n]*\n)*"""(.*?)"""\n(.*)', source, re.DOTALL).groups()
    title, _, introduction = docstring.partition("\n")
    page = [f"# {title.rstrip('.')}", introduction.strip()]
    for cell in re.split(r"^# %%", rest, flags=re.MULTILINE):
        kind, _, body = cell.partition("\n")
        text = kind.strip() == "[markdown]"
        body = re.sub(r"^# ?", "", body, flags=re.MULTILINE).strip() if text else cell_code(kind, body)
        page += [body] if body else []
    return "\n\n".join(page) + "\n"


def cell_code(title: str, body: str) -> str:
    """The code of a cell, under its title."""
    fenced = f"```python\n{body.strip()}\n```" if body.strip() else ""
    return f"## {title.strip()}\n\n{fenced}" if title.strip() else fenced


def on_files(files, config):
    """Add the pages that are made of files outside docs/, and the pictures that pages and results show."""
    pages = {f"examples/{path.stem}.md": as_page(path.read_text()) for path in sorted(ROOT.glob("examples/*.py"))}
    pages["changelog.md"] = (ROOT / "CHANGELOG.md").read_text()
    results = ROOT / "experiments" / "RESULTS.md"
    pages["results.md"] = results.read_text() if results.is_file() else LATER
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    for picture in [*ROOT.glob("bench/results/*.png"), *ROOT.glob("experiments/**/*.png")]:
        uri = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Relative links out of docs/ lead to the pages and pictures of ``on_files``; other files are named, not linked."""
    stands_at = {"results.md": "experiments/RESULTS.md", "changelog.md": "CHANGELOG.md"}
    source = stands_at.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    if page.file.src_uri.startswith("examples/"):
        source = page.file.src_uri

    def here(match: re.Match) -> str:
        target = match[2]
        if re.match(r"[a-z]+:", target):
            return match[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        place = re.sub(r"^examples/(.*)\.py$", r"examples/\1.md", place).removeprefix("docs/")
        place = {"CHANGELOG.md": "changelog.md", "experiments/RESULTS.md": "results.md", "README.md": "index.md"}.get(
            place, place
        )
        return match[1] + posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(here, markdown)
