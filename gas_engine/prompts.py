"""Prompts from a file of any of the usual forms, or from the option itself."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["read_prompts"]

COLUMNS = ("caption", "prompt", "text")


def read_prompts(source: str) -> list[str]:
    """The prompts of a file, or the prompt that ``source`` is where it names none.

    | file | prompts |
    |---|---|
    | .json of COCO, ``{"annotations": [{"image_id", "id", "caption"}]}`` | of each image the caption of lowest id |
    | .json, .jsonl of strings, or of objects | those, or their "caption", "prompt" or "text" |
    | .csv, .tsv | the column of such a name |
    | any other | a line each; empty lines are left out |

    Raises ValueError, with the file and the place, for a missing or foreign file and for one without prompts.

        read_prompts("captions_val2014.json"), read_prompts("a red cat")
    """
    suffix = Path(source).suffix.lower()
    if not os.path.isfile(source):
        if suffix in (".txt", *_READERS) or os.path.isdir(source):
            raise ValueError(f"there is no file of prompts {source!r}; give a file, or the prompt itself")
        prompts = [source.strip()]
    else:
        try:
            text = Path(source).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} is no text in UTF-8 (byte {error.start})") from None
        try:
            prompts = [" ".join(prompt.split()) for prompt in _READERS.get(suffix, str.splitlines)(text)]
        except ValueError as error:
            raise ValueError(f"cannot read prompts from {source}: {error}") from None
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(f"there is no prompt in {source!r}")
    return prompts


def _json(text: str) -> Iterable[str]:
    value = json.loads(text)
    if not isinstance(value, dict):
        return _records(value)
    annotations = value.get("annotations")
    if not isinstance(annotations, list):
        raise ValueError(f"it is an object of {', '.join(map(str, value))[:80] or 'nothing'}, without 'annotations'")
    first: dict[Any, tuple[int, str]] = {}
    for n, annotation in enumerate(annotations):
        try:
            image, found = annotation["image_id"], (int(annotation["id"]), str(annotation["caption"]))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"annotation {n} has no image_id, id and caption") from None
        first[image] = min(first.get(image, found), found)
    return [caption for _, caption in sorted(first.values())]


def _lines(text: str) -> Iterable[str]:
    return _records([json.loads(line) for line in text.splitlines() if line.strip()])


def _records(values: Any) -> list[str]:
    """Strings, or objects with one of the columns."""
    if not isinstance(values, list):
        raise ValueError(f"it holds {type(values).__name__}, not a list of prompts")
    return [_column(value, n) if isinstance(value, dict) else _string(value, n) for n, value in enumerate(values)]


def _column(record: dict[Any, Any], n: int) -> str:
    found = {str(key).strip().lower(): value for key, value in record.items()}
    name = next((name for name in COLUMNS if name in found), None)
    if name is None:
        raise ValueError(
            f"it has {', '.join(found)[:80] or 'nothing'}, but no {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}"
        )
    return _string(found[name], n)


def _string(value: Any, n: int) -> str:
    if not isinstance(value, str):
        raise ValueError(f"prompt {n} is {value!r:.40}, no text")
    return value


def _table(delimiter: str) -> Callable[[str], Iterable[str]]:
    def read(text: str) -> list[str]:
        try:
            rows = list(csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True))
        except csv.Error as error:
            raise ValueError(str(error)) from None
        return [_column(row, n) for n, row in enumerate(rows)]

    return read


_READERS: dict[str, Callable[[str], Iterable[str]]] = {
    ".json": _json,
    ".jsonl": _lines,
    ".csv": _table(","),
    ".tsv": _table("\t"),
}
