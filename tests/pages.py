"""What the pages of docs/ say to type: their blocks, and commands run as a terminal would, with few updates."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from gas_engine import __main__ as command_line

ROOT = Path(__file__).parent.parent
# What makes a run small: 5 updates of 2 samples, everything else measured on 2.
SMALL = {
    "--iterations": "5", "--batch": "2", "--train-seeds": "0-3", "--selection": "2", "--held-out": "2",
    "--evaluation": "student", "--logger": "none", "--sample-every": "5", "--save-every": "5", "--evaluate-every": "5",
    "--teacher.steps": "7", "--device": "cpu",
}  # fmt: skip
BLOCK = re.compile(r"^```(sh|python|text)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of each block of a page of docs/, in order."""
    return BLOCK.findall((ROOT / "docs" / f"{page}.md").read_text())


def commands(text: str) -> list[list[str]]:
    """The words of each line of a block, without the program's name."""
    lines = [shlex.split(line) for line in text.splitlines() if line.strip()]
    assert all(line[0] == "gas-engine" for line in lines), lines
    return [line[1:] for line in lines]


def smaller(words: list[str]) -> list[str]:
    """The command with few updates and small measurements."""
    if words[0] != "train":
        return words
    kept, skip = [], False
    for word in words:
        if not skip and word not in SMALL:
            kept.append(word)
        skip = word in SMALL
    return kept + [word for pair in SMALL.items() for word in pair]


def run(monkeypatch, words: list[str]) -> None:
    """Run a command as its words stand; it must not fail."""
    monkeypatch.setattr(sys, "argv", ["gas-engine", *words])
    sys.modules.pop("mymodel", None)  # another page's may be of the same name
    try:
        command_line.main()
    except SystemExit as stop:
        assert not stop.code, words
