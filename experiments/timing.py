"""Seconds a training step, and of what machine."""

import importlib
import os
import platform
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import keras

from experiments.data import Batches


def seconds_per_step(
    models: Mapping[str, keras.Model], batches: Batches, rounds: int, steps_per_round: int = 1
) -> dict[str, float]:
    """The median time of a training step of each model, taken in turn so that a busy machine is busy for all.

    Args:
        models: compiled models, by name; they are trained on a few batches more.
        batches: whose first batches are used, all of one size.
        rounds: how often each model is timed.
        steps_per_round: steps that are timed as one; as many as the penalty's interval, whose steps differ.

    Returns:
        Seconds, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():  # compilation is no part of a step
        model.train_on_batch(*batches[0])
    full_batches = max(1, len(batches) - 1)  # the last one may be smaller, and would be compiled anew
    for turn in range(rounds):
        for name, model in models.items():
            chosen = [batches[(turn + step) % full_batches] for step in range(steps_per_round)]
            start = time.perf_counter()
            for images, labels in chosen:
                model.train_on_batch(images, labels)
            times[name].append((time.perf_counter() - start) / steps_per_round)
    return {name: statistics.median(taken) for name, taken in times.items()}


def machine() -> dict[str, str | int]:
    """What a time was measured on: processor, cores that this process may use, and versions."""
    backend = keras.backend.backend()
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "keras": keras.__version__,
        "backend": f"{backend} {_backend_version(backend)}",
    }


def _processor() -> str:
    description = Path("/proc/cpuinfo")
    if description.exists():
        for line in description.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _backend_version(backend: str) -> str:
    return importlib.import_module(backend).__version__
