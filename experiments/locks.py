"""A lock keeps a second process out of a run's folder or a study's cell, and says who holds it."""

import contextlib
import datetime
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import filelock

from experiments import files
from experiments.errors import ExperimentError

PATIENCE = 0.5
"""Seconds for which to ask for a lock again: `holder` takes it for a moment to see whether it is free."""


class Holder(NamedTuple):
    """The process that holds a lock, or held it last.

    Attributes:
        host: the name of its machine.
        pid: its number there.
        since: when it took the lock, in ISO 8601.
    """

    host: str = "another host"
    pid: int = 0
    since: str = ""

    def __str__(self):
        return f"process {self.pid} on {self.host} since {self.since}" if self.pid else "another process"


class InUseError(ExperimentError):
    """Another process holds the lock.

    Args:
        what: the path on which it works.
        holder: which process it is.
    """

    def __init__(self, what: Path, holder: Holder):
        self.holder = holder
        super().__init__(
            f"{what} is in use by {holder}. Wait for its end, or stop it, or choose another folder with --folder=PATH."
        )


@contextlib.contextmanager
def held(lock: Path, what: Path) -> Iterator[None]:
    """Hold a lock. When the process ends, however that happens, the lock is free again.

    Args:
        lock: the lock's file, which stays. Beside it a JSON file tells who holds it.
        what: the path that is locked, for the message.

    Raises:
        InUseError: another process has it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(lock, timeout=PATIENCE):
            files.discard_unfinished(lock.parent, told_in(lock).name)  # of a process that was killed right here
            now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            files.write_json(told_in(lock), Holder(socket.gethostname(), os.getpid(), now)._asdict())
            yield
    except filelock.Timeout as error:
        raise InUseError(what, last_holder(lock)) from error


def discard(lock: Path) -> None:
    """Remove a lock that nobody needs any more, with the file that tells who held it, unless a process holds it."""
    if lock.exists():
        with contextlib.suppress(filelock.Timeout), filelock.FileLock(lock, timeout=0):
            told_in(lock).unlink(missing_ok=True)
            lock.unlink(missing_ok=True)


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock."""
    if not lock.exists():
        return False
    try:
        with filelock.FileLock(lock, timeout=0):
            return False
    except filelock.Timeout:
        return True


def last_holder(lock: Path) -> Holder:
    """The process that holds a lock, or held it last, if that is known."""
    found = files.read_object(told_in(lock)) or {}
    return Holder(**{key: found[key] for key in Holder._fields if key in found})


def told_in(lock: Path) -> Path:
    """The file that tells who holds a lock."""
    return lock.with_name(f"{lock.name}.json")
