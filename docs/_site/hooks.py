"""What the site does beyond MkDocs: formulas, links to the repository's files, and notebooks of the guides."""

import html
import json
import posixpath
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File

FORMULA = re.compile(
    r'<div class="arithmatex">\\\[(?P<block>.*?)\\\]</div>|<span class="arithmatex">\\\((?P<inline>.*?)\\\)</span>',
    re.DOTALL,
)
TAG = re.compile(r"\\tag\{(\d+)\}")
CELL = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n.*?^```\n)?", re.DOTALL | re.MULTILINE)
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to files outside docs/, such as `../jvpreg/clone.py`, lead to the repository; equations get anchors."""
    here = posixpath.dirname(page.file.src_uri)

    def absolute(link: re.Match[str]) -> str:
        path, _, anchor = link[1].partition("#")
        place = posixpath.normpath(posixpath.join("docs", here, path))
        if place.startswith("docs/") and place.endswith((".md", ".png")):
            return link[0]
        return f"]({config.repo_url}/blob/main/{place}{'#' + anchor if anchor else ''})"

    parts = FENCE.split(markdown)  # text and blocks of code in turn
    parts[::2] = [re.sub(r"\]\((?!https?://|#)([^)\s]+)\)", absolute, text) for text in parts[::2]]
    markdown = "".join(parts)
    markdown = re.sub(r"^(?=\$\$.*\\tag\{(\d+)\})", r'<a id="eq-\1"></a>\n\n', markdown, flags=re.MULTILINE)
    if page.file.src_uri.startswith("guides/"):
        owner = config.repo_url.removeprefix("https://github.com/").rstrip("/")
        notebook = posixpath.basename(page.file.src_uri).replace(".md", ".ipynb")
        colab = f"https://colab.research.google.com/github/{owner}/blob/gh-pages/guides/{notebook}"
        head, newline, rest = markdown.partition("\n")
        markdown = (
            f"{head}{newline}\n[Open in Colab]({colab}) · [this page as a notebook]({notebook}){{: download }}\n{rest}"
        )
    return markdown


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Formulas become MathML, which browsers draw without a script. `\\tag{3}` gives one its number."""

    def drawn(formula: re.Match[str]) -> str:
        latex = html.unescape(formula["block"] or formula["inline"])
        if formula["inline"]:
            return latex2mathml.converter.convert(latex)
        number = TAG.search(latex)
        shown = latex2mathml.converter.convert(TAG.sub("", latex).strip(), display="block")
        if not number:
            return f'<div class="equation">{shown}</div>'
        return f'<div class="equation">{shown}<span class="number">({number[1]})</span></div>'

    return FORMULA.sub(drawn, content)


def on_files(files: Any, config: Any) -> Any:
    """Each guide as a notebook without outputs, beside its page."""
    for guide in sorted(Path(config.docs_dir, "guides").glob("*.md")):
        content = json.dumps(notebook(guide.read_text(encoding="utf-8"), config.repo_url), indent=1)
        files.append(File.generated(config, f"guides/{guide.stem}.ipynb", content=content))
    return files


def notebook(text: str, repository: str) -> dict[str, Any]:
    """Blocks of Python become cells of code, with what they print left out; the rest becomes cells of text."""
    text = text.replace("](../", f"]({repository}/blob/main/docs/")
    package = f"jvpreg[tensorflow,pictures] @ git+{repository}"
    cells = [_cell("code", f"%pip install --quiet '{package}' scikit-learn")]
    end = 0
    for block in CELL.finditer(text):
        cells += [_cell("markdown", text[end : block.start()]), _cell("code", block[1])]
        end = block.end()
    cells.append(_cell("markdown", text[end:]))
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return {"cells": [cell for cell in cells if cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 4}


def _cell(kind: str, source: str) -> dict[str, Any] | None:
    if kind == "markdown":
        source = re.sub(r"^!\[.*\]\(.*\)\n", "", source, flags=re.MULTILINE)  # the cells draw them
    if not source.strip():
        return None
    cell = {"cell_type": kind, "metadata": {}, "source": source.strip()}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})
