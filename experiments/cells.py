"""The cells of a study: independent trainings, each with a file of its own, so that a study that was cut goes on."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.errors import ExperimentError


def finished_or_run(path: Path, settings: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a cell's file holds, or what `run` returns, which is then written there in one piece.

    Args:
        path: the cell's file, ending in `.json`.
        settings: all that the result depends on, in plain values.
        run: trains the cell.

    Raises:
        ExperimentError: the file holds a result of other settings.
    """
    if path.exists():
        cell = json.loads(path.read_text())
        stored = cell["settings"]
        differing = [key for key in {**stored, **settings} if stored.get(key) != settings.get(key)]
        if differing:
            found = "; ".join(f"{key} was {stored.get(key)!r} and is now {settings.get(key)!r}" for key in differing)
            raise ExperimentError(f"{path} holds a result of other settings: {found}. Choose another --folder.")
        return cell["result"]
    result = run()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"settings": settings, "result": result}, indent=2))
    os.replace(unfinished, path)
    return result


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the standard deviation with one degree of freedom taken off (NaN for a single value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def percent(values: Sequence[float]) -> str:
    """Mean and deviation of parts, as a table's cell in per cent."""
    mean, deviation = mean_and_deviation(values)
    return f"{100 * mean:.2f}" + (f" ± {100 * deviation:.2f}" if len(values) > 1 else "")
