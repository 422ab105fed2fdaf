"""The code of pages in docs/ runs, and prints and draws what the page shows; every public name is on a page."""

import re
import warnings

import keras
import pytest

from tests import interface
from tests.pages import BLOCK, DOCS, PAGES, ROOT, blocks, words

# Pages whose blocks are a program, in which nothing is left out; and those that train: numbers differ by the processor.
PROGRAMS = ["tutorial-rules.md", "where-to-look.md", "extending.md", "faq.md", "second-derivatives.md"]
TRAINING = ["index.md", *(f"guides/{name}.md" for name in ("constrain", "distill", "explain", "regularize", "watch"))]
# Pages of which other tests run the code.
ELSEWHERE = {"README.md", "tour.md", "tracking.md", "many-devices.md"}
# What a page says of its numbers, in terms of its variables.
CLAIMS = {
    "guides/regularize.md": [
        "histories[0.003]['jacobian/frobenius_norm'][-1] < histories[0.0]['jacobian/frobenius_norm'][-1] / 2",
        "under_attack[0.003][2] > under_attack[0.0][2] + 0.05",
    ],
    "guides/constrain.md": ["reports['free'].violated > 0.1", "reports['monotone'].violated < 0.02"],
}


def run(name, capsys, numbers):
    namespace = {"__name__": "page"}
    for code, printed in blocks(DOCS / name):
        with warnings.catch_warnings(record=True) as announced:
            warnings.filterwarnings("always", "Some nodes of")
            exec(compile(code, name.split("/")[-1], "exec"), namespace)
        messages = [f"{warning.category.__name__}: {warning.message}" for warning in announced]
        # Lines are broken anew on the page.
        told = "\n".join([capsys.readouterr().out, *messages])
        assert words(told, numbers) == words(printed, numbers), code
    return namespace


@pytest.mark.parametrize("page", PROGRAMS)
def test_the_code_of_the_page(page, capsys):
    run(page, capsys, numbers=True)


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="one backend is enough: they are of many seconds")
@pytest.mark.parametrize("page", TRAINING)
def test_a_page_that_trains(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    namespace = run(page, capsys, numbers=False)
    for claim in CLAIMS.get(page, []):
        assert eval(claim, namespace), claim
    if page.startswith("guides/"):
        shown = set(re.findall(r"\]\((pictures/.*?\.png)\)", (DOCS / page).read_text(encoding="utf-8")))
        assert shown == {f"pictures/{file.name}" for file in (tmp_path / "pictures").iterdir()} != set()
        assert all((DOCS / "guides" / picture).exists() for picture in shown)


def test_every_page_with_code_is_run():
    with_code = {
        page.relative_to(ROOT).as_posix().removeprefix("docs/") for page in PAGES if BLOCK.search(page.read_text())
    }
    assert {name.removeprefix("docs/") for name in with_code} == {*PROGRAMS, *TRAINING, *ELSEWHERE}


def test_every_public_name_is_on_a_page_of_the_reference():
    shown = [
        name.removeprefix("jvpreg.")
        for page in (DOCS / "reference").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert len(shown) == len(set(shown))
    # A page shows a class with its methods.
    missing = [name for name in interface.public_names() if not {name, name.rpartition(".")[0]} & set(shown)]
    assert missing == ["distillation.JacobianDistiller"], "which is there as `jvpreg.JacobianDistiller`"
