"""Files that are complete or do not exist."""

import contextlib
import os
import uuid
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under another name and renames it, so that a killed process leaves the old file or the new one.

    Raises:
        OSError: the disk is full, or the folder cannot be written to. The old file is as it was.
    """
    # The name is unique: two processes that write the same file do not mix their content.
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # Otherwise a machine that loses power may keep the name and not the bytes.
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
