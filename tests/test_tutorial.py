"""The code of pages in docs/ runs, and prints what the page says that it prints."""

import re
import warnings
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
# A block of code, and what it prints, if a block of text is all that stands between it and the next paragraph.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("page", "count"), [("tutorial-rules.md", 6), ("where-to-look.md", 3)])
def test_the_code_of_the_page(page, count, capsys):
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = BLOCK.findall(text)
    assert len(blocks) == text.count("```python") >= count
    namespace = {"__name__": "tutorial"}
    for code, printed in blocks:
        with warnings.catch_warnings(record=True) as announced:
            warnings.filterwarnings("always", "Some nodes of")
            exec(compile(code, page, "exec"), namespace)
        messages = [f"{warning.category.__name__}: {warning.message}" for warning in announced]
        # Lines are broken anew on the page.
        assert "\n".join([capsys.readouterr().out, *messages]).split() == printed.split(), code
