"""Resident memory in bytes: of this process, and what a call adds to that of a process of its own."""

import ctypes
import gc
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments import processes

KILOBYTE = 1024
STATUS = Path("/proc/self/status")


def resident_peak() -> int:
    """The largest resident size so far."""
    if STATUS.exists():
        # `ru_maxrss` of a child begins with what its parent held, on Linux; this does not.
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else KILOBYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident() -> int:
    """The resident size, on Linux."""
    return _status("VmRSS")


def forget_peak() -> None:
    """The largest resident size so far is the present one again."""
    Path("/proc/self/clear_refs").write_text("5")


def settle() -> None:
    """Free what nothing refers to, and give it back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def added_peak(name: str, function: Callable, *arguments: Any) -> int | MemoryError:
    """Peak memory that a call adds to what a process of its own holds after its imports, compilation included.

    Args:
        name: of what is run, for the message of an error.
        function: of a module.
        *arguments: that can be pickled.

    Returns:
        Bytes; a MemoryError where the process ran out of memory or was killed.

    Raises:
        RuntimeError: the process failed in another way.
    """
    found = processes.memory(_added, (name, function, arguments))
    return found if isinstance(found, MemoryError) else found["peak"]


def _added(name: str, function: Callable, arguments: tuple) -> Iterator[dict[str, int]]:
    before = resident_peak()
    function(*arguments)
    yield {"peak": resident_peak() - before}


def _status(name: str) -> int:
    return next(int(line.split()[1]) * KILOBYTE for line in STATUS.read_text().splitlines() if line.startswith(name))
