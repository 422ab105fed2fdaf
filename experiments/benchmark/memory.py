"""The resident memory of this process, in bytes."""

import ctypes
import gc
import resource
import sys
from pathlib import Path

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


def _status(name: str) -> int:
    return next(int(line.split()[1]) * KILOBYTE for line in STATUS.read_text().splitlines() if line.startswith(name))
