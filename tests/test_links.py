"""Every link of the README and of the pages in docs/ to a file of the repository leads somewhere."""

import re
from pathlib import Path

import pytest

from tests.pages import DOCS, PAGES, README, ROOT

(REPOSITORY,) = re.findall(r"^repo_url: (\S+)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
FILES = re.compile(rf"{REPOSITORY}/(?:blob|raw)/main/")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    found = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return found | {f"eq-{number}" for number in re.findall(r"\\tag\{(\d+)\}", page.read_text())}


def links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)]+)\)", text)


LINKS = [
    (page, link)
    for page in [*PAGES, DOCS / "reference" / "index.md"]
    for link in links(page)
    if FILES.match(link) or not link.startswith(("http://", "https://"))
]


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_a_link_leads_somewhere(page, link):
    path, _, anchor = FILES.sub("", link).partition("#")
    target = page if not path else (ROOT if FILES.match(link) else page.parent) / path
    assert target.exists()
    assert not anchor or anchor in anchors(target)


def test_the_readme_can_be_read_elsewhere():
    """On the page of a package no link to a file beside it leads anywhere."""
    assert all(link.startswith(("http://", "https://")) for link in links(README))
    assert sum(bool(FILES.match(link)) for link in links(README)) > 10
