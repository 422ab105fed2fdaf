"""The memory of one entry, in a process: `python -m experiments.benchmark.memory_process NAME MODE SETTINGS`."""

import dataclasses
import gc
import json
import sys
from pathlib import Path
from typing import Literal

from experiments.benchmark import memory
from experiments.benchmark.config import MemoryConfig
from experiments.config import ModelConfig

Mode = Literal["eager", "compiled"]

ENVIRONMENT = {
    # What is measured is the process' resident memory, which a GPU's is no part of.
    "CUDA_VISIBLE_DEVICES": "-1",
    "JAX_PLATFORMS": "cpu",
    # The C library gives blocks from this size on back to the system when they are freed. By itself it moves the size.
    "MALLOC_MMAP_THRESHOLD_": "65536",
    # With oneDNN, TensorFlow keeps what is freed in a pool of its own, where resident memory cannot tell it.
    "TF_ENABLE_ONEDNN_OPTS": "0",
}


def measured(name: str, mode: Mode, config: MemoryConfig) -> dict[str, int | None] | MemoryError:
    """What an entry adds to the memory of a process that has run it once before.

    Args:
        name: of the entry.
        mode: whether what is run is compiled, as the configuration says, or eager.
        config: of the study.

    Returns:
        Bytes: the `baseline` (interpreter, libraries, weights, batch and compiled code), the `peak` over it, what is
        `held` over it by what is kept alive, and what its tensors sum to, `counted`; a MemoryError where the process
        ran out of memory or was killed.
    """
    words = [name, mode, json.dumps(dataclasses.asdict(config))]
    return memory.of_process("experiments.benchmark.memory_process", words, ENVIRONMENT)


def main(name: str, mode: Mode, settings: str) -> None:
    """Run an entry twice, and print what the second run added."""
    from experiments.benchmark import calls
    from experiments.benchmark.memory_entries import ENTRIES, counted_bytes, subject

    keys = json.loads(settings)
    config = MemoryConfig(**{**keys, "model": ModelConfig(**keys["model"])})
    entry = next(entry for entry in ENTRIES if entry.name == name)
    jit = None if mode == "eager" else config.jit_compile
    made = subject(config, config.num_probes if entry.several else 1, jit)
    # Compiles, and lets the libraries take what they never give back.
    calls.wait(entry.make(made))
    settle()
    baseline = resident()
    forget_peak()
    held = entry.make(made)
    calls.wait(held)
    peak = memory.resident_peak()
    settle()
    sizes = {"baseline": baseline, "peak": peak - baseline, "held": resident() - baseline}
    print(json.dumps({**sizes, "counted": counted_bytes(held, made)}))


def resident() -> int:
    """The resident size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * memory.KILOBYTE for line in lines if line.startswith("VmRSS"))


def forget_peak() -> None:
    """The largest resident size so far is the present one again."""
    Path("/proc/self/clear_refs").write_text("5")


def settle() -> None:
    """Free what nothing refers to, and give it back to the system."""
    import ctypes

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
