"""Every link of the README and of the pages in docs/ to a file of the repository leads somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


LINKS = [
    (page.name, link)
    for page in PAGES
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text())
    if not link.startswith(("http://", "https://"))
]


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_a_link_leads_somewhere(page, link):
    file, _, anchor = link.partition("#")
    page = next(path for path in PAGES if path.name == page)
    target = page if not file else page.parent / file
    assert target.exists()
    assert not anchor or anchor in anchors(target)
