"""The code of docs/tutorial-rules.md runs, and prints what the page says that it prints."""

import re
import warnings
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "tutorial-rules.md"
# A block of code, and what it prints, if a block of text is all that stands between it and the next paragraph.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)


def test_the_code_of_the_page(capsys):
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) == PAGE.read_text(encoding="utf-8").count("```python") > 5
    namespace = {"__name__": "tutorial"}
    for code, printed in blocks:
        with warnings.catch_warnings(record=True) as announced:
            warnings.filterwarnings("always", "Some nodes of")
            exec(compile(code, PAGE.name, "exec"), namespace)
        messages = [f"{warning.category.__name__}: {warning.message}" for warning in announced]
        # Lines are broken anew on the page.
        assert "\n".join([capsys.readouterr().out, *messages]).split() == printed.split(), code
