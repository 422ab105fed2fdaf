"""Reads the package's docstrings: an example that begins with `>>>` is code, also where it is not indented."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Puts each doctest of a docstring into a fence, so that Markdown does not take it for a quotation."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Changes the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """The text with a fence around each run of lines from `>>>` to the next empty line."""
    lines, inside = [], False
    for line in text.splitlines():
        if not inside and line.startswith(">>>"):
            lines.append("```pycon")
            inside = True
        elif inside and not line.strip():
            lines.append("```")
            inside = False
        lines.append(re.sub(r"\s+# doctest: .*", "", line))
    return "\n".join([*lines, "```"] if inside else lines)
