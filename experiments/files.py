"""Files that are complete or do not exist: each is written under another name and renamed, whatever stops the process.

It does not use the files of jvpreg's callbacks, which import Keras: `status` and errors in a key must come at once.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

UNFINISHED = ".unfinished-"
"""The prefix of the name of a file that is still being written."""

_being_written: set[Path] = set()
"""What this process is writing."""


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A path in the same folder at which to write a file or a folder. At the end it is renamed to `path`.

    A file that exists is replaced; a folder must not exist yet. The name has the file's ending, by which writers know
    the format, and no other process has the same. What killed processes of this host left of `path` is removed.

    Args:
        path: where the file or the folder will be. Folders above it are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    discard_abandoned(path)
    unfinished = unfinished_name(path)
    _being_written.add(unfinished)
    try:
        yield unfinished
        for part in [*unfinished.rglob("*"), unfinished]:
            synchronize(part)
        os.replace(unfinished, path)
    except BaseException:
        # A partial file on a full disk can often still be removed. The first error is the one to report.
        with contextlib.suppress(OSError):
            discard(unfinished)
        raise
    finally:
        _being_written.discard(unfinished)
    synchronize(path.parent)


def unfinished_name(path: Path) -> Path:
    """A name in the same folder that is unique, among the processes of all hosts and within this one."""
    return path.with_name(f"{UNFINISHED}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def synchronize(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk: a rename must not get there before what it renames."""
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
    """Remove a file or a folder if it exists; a folder all at once, so that no part of it is taken for the whole."""
    if path.is_dir():
        removed = unfinished_name(path)
        os.replace(path, removed)
        path = removed
    discard(path)


def discard(path: Path) -> None:
    """Remove a path that nothing reads any more."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard_abandoned(path: Path) -> None:
    """Remove what processes of this host left of a path when they were killed. What others still write stays."""
    ours = re.compile(rf"{re.escape(f'{UNFINISHED}{socket.gethostname()}')}-(\d+)-[0-9a-f]+-{re.escape(path.name)}")
    for unfinished in list(path.parent.iterdir()):
        written_by = ours.fullmatch(unfinished.name)
        if written_by and unfinished not in _being_written and not _is_running(int(written_by[1])):
            with contextlib.suppress(OSError):  # another process removes it too
                discard(unfinished)


def _is_running(pid: int) -> bool:
    """Whether another process of this host has the number."""
    if pid == os.getpid():
        return False  # One before this had the same number.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # It is another user's.
        return True
    return True


def discard_unfinished(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left unfinished: of one name, or everything in a folder and below.

    Only for whoever holds the lock of what was being written there.
    """
    for path in list(folder.rglob(f"{UNFINISHED}*")):
        if name is None or path.name.endswith(f"-{name}"):
            discard(path)
