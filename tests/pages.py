"""The blocks of code of the README and of the pages in docs/, and what they print."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md")), *sorted((DOCS / "guides").glob("*.md"))]
# A block of code, and what it prints, if a block of text is all that stands between it and the next paragraph.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d+(\.\d+)?(e-?\d+)?")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Each block of code, with what it prints."""
    text = page.read_text(encoding="utf-8")
    found = BLOCK.findall(text)
    assert len(found) == text.count("```python") > 0, page
    return found


def words(printed: str, numbers: bool) -> list[str]:
    """What is printed, without the breaks of lines; numbers that another processor rounds otherwise become `#`."""
    return printed.split() if numbers else NUMBER.sub("#", printed).split()
