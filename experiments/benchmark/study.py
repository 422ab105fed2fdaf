"""The `benchmark step` study: correctness first, then times in turn, then memory."""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
from rich.console import Console

from experiments import files, tables, timing
from experiments.benchmark import entries, measure, memory, report
from experiments.benchmark.check import Check, Checker
from experiments.benchmark.config import StepConfig, TimingConfig
from experiments.benchmark.entries import Entry
from experiments.errors import ExperimentError


def run(config: StepConfig) -> dict[str, Any]:
    """Measure the entries, and write and print what came out.

    Args:
        config: see `StepConfig`.

    Returns:
        What `step.json` holds: the settings, the machine, and a row an entry.

    Raises:
        ExperimentError: where the name of an entry is not known.
    """
    chosen = chosen_entries(config)
    console = tables.wide_console()
    checker = Checker(config)
    checks: dict[str, Check | None] = {}
    for entry in chosen:
        console.print(f"checking {entry.label}")
        checks[entry.name] = checker.check(entry)
    right = [entry for entry in chosen if is_right(checks[entry.name], config)]
    peaks: dict[str, int | MemoryError] = {}
    for entry in right if config.memory else []:
        console.print(f"measuring the memory of {entry.label}")
        peaks[entry.name] = memory.peak_bytes(entry.name, config)
    # What fells a process of its own would fell this one.
    able = [entry for entry in right if not isinstance(peaks.get(entry.name), MemoryError)]
    console.print(f"timing {config.rounds} rounds of {len(able)} entries")
    times = measure.timings(able, config)
    rows = [row(entry, config, checks[entry.name], times.get(entry.name), peaks.get(entry.name)) for entry in chosen]
    summary = {
        "study": "benchmark step",
        **conditions(config),
        "entries": rows,
    }
    write(summary, default_folder(config), console)
    return summary


def check_backend(study: str) -> None:
    """An error on a backend that the benchmarks do not know."""
    if keras.backend.backend() not in ("tensorflow", "jax"):
        raise ExperimentError(f"benchmark {study} runs on TensorFlow and JAX: set KERAS_BACKEND to one of the two.")


def conditions(config: TimingConfig) -> dict[str, Any]:
    """What a file says beside its figures: how steps were compiled, the settings and the machine."""
    return {
        "mode": mode(config),
        "settings": json.loads(json.dumps(dataclasses.asdict(config))),
        "machine": {**timing.machine(), "memory_gigabytes": round(physical_memory() / 1e9, 1)},
    }


def chosen_entries(config: StepConfig) -> list[Entry]:
    """The plain step and what `only` names."""
    names = [entry.name for entry in entries.ENTRIES]
    wanted = ["plain", *chosen_names(config.only, names)]
    return [entry for entry in entries.ENTRIES if entry.name in wanted]


def chosen_names(only: Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """The names that the key `only` lists, by default all.

    Raises:
        ExperimentError: there is no such name.
    """
    for name in only or []:
        if name not in names:
            raise ExperimentError(f"only: there is no entry {name!r}. Expected names among {', '.join(names)}.")
    return list(names if only is None else only)


def is_right(check: Check | None, config: StepConfig) -> bool:
    """Whether an entry is to be timed; the plain step has nothing to check."""
    return check is None or check.error <= config.tolerance


def row(
    entry: Entry,
    config: StepConfig,
    check: Check | None,
    times: measure.Timing | MemoryError | None,
    peak: int | MemoryError | None,
) -> dict[str, Any]:
    """What the JSON file says of an entry; what was not measured is null."""
    return {
        "name": entry.name,
        "label": entry.label,
        "derivative": entry.derivative(config),
        "steps_per_turn": entry.interval,
        "penalty_error": finite(check.penalty_error) if check else None,
        "gradient_error": finite(check.gradient_error) if check else None,
        **measure.outcome(is_right(check, config), times, peak),
        "peak_memory_bytes": peak if isinstance(peak, int) else None,
    }


def write(summary: dict[str, Any], folder: Path, console: Console) -> None:
    """Write step.json, step.md and step.png, and print the table."""
    rows = [report.columns(row) for row in summary["entries"]]
    files.write_json(folder / "step.json", summary)
    files.write_text(folder / "step.md", f"{tables.grid_markdown(rows)}\n\n{report.conditions(summary)}\n")
    report.figure(summary, folder / "step.png")
    console.print(tables.grid(rows))
    console.print(report.conditions(summary))
    console.print(f"Files: {folder}")


def mode(config: TimingConfig) -> str:
    """How steps are compiled, in a word."""
    compiled, other = {"tensorflow": ("xla", "graph"), "jax": ("jit", "eager"), "torch": ("compile", "eager")}[
        keras.backend.backend()
    ]
    return compiled if config.jit_compile else other


def folder(name: str, config: TimingConfig) -> Path:
    """The folder that is named, or one after the study, the backend and the mode."""
    return Path(config.folder or f"runs/benchmark/{name}-{keras.backend.backend()}-{mode(config)}")


def default_folder(config: StepConfig) -> Path:
    """The folder that is named, or one after the backend, the mode and the batch normalization."""
    suffix = "" if config.batch_normalization == "training" else f"-{config.batch_normalization}"
    return Path(config.folder or f"runs/benchmark/step-{keras.backend.backend()}-{mode(config)}{suffix}")


def physical_memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def finite(error: float) -> float | str:
    """The error as JSON has it, which has no infinity."""
    return error if math.isfinite(error) else "infinite"
