"""Options from a file: ``train --config configs/cifar10.yaml --model PATH``.

A file is a mapping of the options of ``train``, those of the teacher one level deeper. Beside options it may say
``title``, ``source`` and ``reproduce`` (figures to arrive at, which nothing reads), and options for one case:
``by_steps: {6: {...}}`` for a K, and ``if_adversarial: {...}``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._cli import InputError
from ..teacher import TeacherSolver
from .options import Config

NOTES = ("title", "source", "reproduce")
CASES = ("by_steps", "if_adversarial")


def with_preset(words: Sequence[str]) -> list[str]:
    """The words of a command line, after those that its --config stands for; what is given beside it comes first.

    Raises InputError for a file that is missing, no YAML, or names no option.
    """
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in words:
        return words
    place = words.index("--config") + 1
    if place == len(words):
        raise InputError("--config needs a file of options, such as configs/cifar10.yaml")
    path = Path(words[place])
    content = _read(path)
    given = {name_of(word) for word in words if word.startswith("--")}
    said = [follows for word, follows in zip(words, [*words[1:], ""], strict=True) if word == "--steps"]
    said += [word.partition("=")[2] for word in words if word.startswith("--steps=")]
    steps = said[0] if said else str(content.get("steps"))
    cases = _mapping(path, "by_steps", content.get("by_steps"))
    adversarial = "adversarial" in given or (content.get("adversarial") and "no_adversarial" not in given)
    options = _flat(path, {name: value for name, value in content.items() if name not in (*NOTES, *CASES)})
    options |= _flat(path, _mapping(path, "if_adversarial", content.get("if_adversarial")) if adversarial else {})
    case = next((case for k, case in cases.items() if str(k) == steps), None)
    options |= _flat(path, _mapping(path, f"by_steps: {steps}", case))
    found: list[str] = []
    for name, value in options.items():
        if not {name, f"no_{name}"} & given:
            found += _words(name, value)
    return found + words


def name_of(word: str) -> str:
    """The option that a word such as --save-every=5 names."""
    return word.lstrip("-").partition("=")[0].replace("-", "_")


def _read(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError:
        raise InputError("--config needs PyYAML, which is not installed: pip install pyyaml") from None
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read the options of {path}: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must be a mapping of options, got {type(content).__name__}")
    return content


def _mapping(path: Path, name: str, value: Any) -> dict[Any, Any]:
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{name} of {path} must be a mapping of options, got {value!r:.40}")
    return value or {}


def _flat(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by the names of the command line, checked."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        inner = value.items() if name == "teacher" and isinstance(value, dict) else ()
        flat |= {f"teacher.{key}": v for key, v in inner}
        if not inner:
            flat[str(name).replace("-", "_")] = value
    known = {field.name for field in dataclasses.fields(Config)} - {"config"}
    known |= {f"teacher.{field.name}" for field in dataclasses.fields(TeacherSolver)}
    strange = next((name for name in flat if name not in known), None)
    if strange is not None:
        raise InputError(f"{path} says {strange!r}, which is no option of train (see train --help)")
    return flat


def _words(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    option = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [option if value else f"--no-{name.replace('_', '-')}"]
    return [option, *map(str, value if isinstance(value, list) else [value])]
