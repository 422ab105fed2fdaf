"""Files that are whole or not there: each is written beside its place and renamed, whatever stops the process.

Without Keras, and so not by the files of jvpreg's callbacks: `status` and errors in a key are told in a moment.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

UNFINISHED = ".unfinished-"
"""How the name of what is still being written begins."""


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A path in the same folder to write a file or a folder at, which takes its place at the end, whole or not at all.

    A file that was there is replaced; a folder must not be there. The name has the ending of the file, by which
    writers know its format, and is no other process's.

    Args:
        path: where the file or the folder will be. Folders above it are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_name(path)
    try:
        yield unfinished
        for part in [*unfinished.rglob("*"), unfinished]:
            synchronize(part)
        os.replace(unfinished, path)
    except BaseException:
        # What could not be written because the disk is full can often be removed; the first error is the one to tell.
        with contextlib.suppress(OSError):
            discard(unfinished)
        raise
    synchronize(path.parent)


def unfinished_name(path: Path) -> Path:
    """A name in the same folder that no other process has, on no host, nor this one a second time."""
    return path.with_name(f"{UNFINISHED}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def synchronize(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder: a rename must not be there before what it renames."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with beside(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a JSON file."""
    write_text(path, json.dumps(value, indent=indent))


def save_figure(figure: Any, path: Path) -> None:
    """Draw a figure of matplotlib into a file."""
    with beside(path) as unfinished:
        figure.savefig(unfinished, dpi=150)


def read_object(path: Path) -> dict[str, Any] | None:
    """The object that a JSON file holds; None if the file is damaged, or not there."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # torn, empty, or no text at all
        return None
    return value if isinstance(value, dict) else None


def remove(path: Path) -> None:
    """Remove a file or a folder if it is there; a folder at once, so that no part of it is taken for the whole."""
    if path.is_dir():
        removed = unfinished_name(path)
        os.replace(path, removed)
        shutil.rmtree(removed)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove what nothing looks for."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard_unfinished(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left unfinished: of one name, or of all in a folder and below.

    Only for whoever holds the lock of what was being written there.
    """
    for path in list(folder.rglob(f"{UNFINISHED}*")):
        if name is None or path.name.endswith(f"-{name}"):
            discard(path)
