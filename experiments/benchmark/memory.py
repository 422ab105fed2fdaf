"""The peak memory of an entry, in a process of its own: `python -m experiments.benchmark.memory NAME SETTINGS`."""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from experiments.benchmark.config import StepConfig
from experiments.config import ModelConfig

ROOT = Path(__file__).parents[2]
KILOBYTE = 1024


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
    printed = last_line("experiments.benchmark.memory", [name, json.dumps(dataclasses.asdict(config))])
    return printed if isinstance(printed, MemoryError) else int(printed)


def last_line(module: str, words: list[str], environment: Mapping[str, str] | None = None) -> str | MemoryError:
    """What a module prints last that runs in a process of its own.

    Args:
        module: its name.
        words: its arguments, the first of which is the name of what it measures.
        environment: variables that it has beside those of this process.

    Returns:
        The line; a MemoryError where the process ran out of memory or was killed.

    Raises:
        RuntimeError: the process failed in another way.
    """
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **(environment or {})}, capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout.splitlines()[-1]
    from experiments.benchmark.measure import out_of_memory

    last = (done.stderr.strip() or "no message").splitlines()[-1]
    if done.returncode == -9:
        return MemoryError("the process was killed, as a system does that runs out of memory")
    return out_of_memory(RuntimeError(f"The process that measures the memory of {words[0]!r} failed: {last}"))


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
    print(resident_peak() - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
