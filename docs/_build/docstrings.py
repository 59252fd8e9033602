"""Docstrings as Markdown: an indented example after `::` or after a sentence is code."""

from __future__ import annotations

import re

import griffe


class Examples(griffe.Extension):
    """`text::` ends in one colon, as it is read; examples without an empty line before them get one."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"::$", ":", obj.docstring.value, flags=re.MULTILINE)
