"""Runs the guides, and writes into docs/guides what they print and draw.

`KERAS_BACKEND=tensorflow python docs/run_guides.py`, from the root of the repository.
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))


def run(guide: Path) -> None:
    """Runs a guide in a folder of its own; keeps its pictures, and its output as the text beneath each block."""
    from tests.pages import BLOCK

    namespace = {"__name__": "guide"}

    def block(found) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(found[1], guide.name, "exec"), namespace)
        code, printed = f"```python\n{found[1]}```\n", out.getvalue()
        return code + (f"\n```text\n{printed}```\n" if printed else "")

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        guide.write_text(BLOCK.sub(block, guide.read_text(encoding="utf-8")), encoding="utf-8")
        shutil.copytree("pictures", DOCS / "guides" / "pictures", dirs_exist_ok=True)


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "agg")
    for page in sorted((DOCS / "guides").glob("*.md")):
        run(page)
