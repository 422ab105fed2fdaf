"""The peak memory of an entry, in a process of its own: `python -m experiments.benchmark.memory NAME SETTINGS`."""

import dataclasses
import json
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import processes
from experiments.benchmark.config import StepConfig
from experiments.config import ModelConfig

KILOBYTE = 1024
TIME_LIMIT = 3600
"""Seconds that a process may take."""


def peak_bytes(name: str, config: StepConfig) -> int | MemoryError:
    """Peak memory that an entry's first steps add to what a process holds after its imports.

    Compilation is part of it.

    Args:
        name: of the entry.
        config: of the study.

    Returns:
        Bytes; a MemoryError where the process ran out of memory or was killed.

    Raises:
        RuntimeError: the process failed in another way.
    """
    found = of_process("experiments.benchmark.memory", [name, json.dumps(dataclasses.asdict(config))], {})
    return found if isinstance(found, MemoryError) else found["peak"]


def of_process(module: str, words: list[str], environment: Mapping[str, str]) -> dict[str, Any] | MemoryError:
    """What a module measures in a process of its own; see `processes.row`.

    Args:
        module: prints it as JSON.
        words: its arguments, the first of which is the name of what it measures.
        environment: variables that it has beside those of this process.

    Returns:
        That; a MemoryError where the process ran out of memory or was killed.

    Raises:
        RuntimeError: the process failed in another way.
    """
    found = processes.row(module, words, TIME_LIMIT, environment)
    if "failure" not in found:
        return found
    if found["failure"].startswith(f"exit status {-signal.SIGKILL}:"):
        return MemoryError("the process was killed, as a system does that runs out of memory")
    from experiments.benchmark.measure import out_of_memory

    return out_of_memory(
        RuntimeError(f"The process that measures the memory of {words[0]!r} failed: {found['failure']}")
    )


def resident_peak() -> int:
    """The largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            # `ru_maxrss` of a child begins with what its parent held, on Linux; this does not.
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * KILOBYTE
    unit = 1 if sys.platform == "darwin" else KILOBYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(name: str, settings: str) -> None:
    """Take a few steps of an entry, and print what they added to the peak."""
    from experiments.benchmark import entries, measure

    keys = json.loads(settings)
    config = StepConfig(**{**keys, "model": ModelConfig(**keys["model"])})
    entry = next(entry for entry in entries.ENTRIES if entry.name == name)
    before = resident_peak()
    measure.turn(measure.training_step(entry, config), config.memory_steps)
    print(json.dumps({"peak": resident_peak() - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
