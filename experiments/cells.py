"""The cells of a study: independent trainings, shared among any number of processes that use the study's folder."""

import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from rich.console import Console

from experiments import files, locks
from experiments.errors import ExperimentError, say
from experiments.run_folder import differences

PAUSE = 1.0
"""Seconds after which this process looks again at the cells that others hold."""


class Work(Protocol):
    """Something that only one process does at a time, and that is done only once."""

    def result(self) -> dict[str, Any]:
        """The result, computed now or before.

        Raises:
            locks.InUseError: another process works on it.
        """


class Cell(NamedTuple):
    """A training with a file of its own.

    Attributes:
        path: the cell's file, ending in `.json`.
        settings: everything on which the result depends, in plain values.
        run: trains the cell.
    """

    path: Path
    settings: dict[str, Any]
    run: Callable[[], dict[str, Any]]

    def result(self) -> dict[str, Any]:
        """The result in the cell's file; if there is none, that of `run`, which is then written there.

        Raises:
            ExperimentError: the file holds a result of other settings, or another process works on it.
        """
        found, lock = self._finished(), lock_of(self.path)
        if found is not None:
            locks.discard(lock)  # of a process that was killed when all that it had left to do was this
            return found
        with locks.held(lock, self.path):
            found = self._finished()  # by the process that held the lock before
            if found is None:
                files.discard_unfinished(self.path.parent, self.path.name)
                if self.path.exists():
                    say(f"{self.path} is damaged: it is worked out again.")
                found = self.run()
                files.write_json(self.path, {"settings": self.settings, "result": found})
            # Written while the lock is held, so that the next holder finds the result.
            for file in (locks.told_in(lock), lock):
                file.unlink(missing_ok=True)
        return found

    def _finished(self) -> dict[str, Any] | None:
        cell = files.read_object(self.path)
        if cell is None or not cell.keys() >= {"settings", "result"}:
            return None
        if differing := differences(cell["settings"], self.settings):
            raise ExperimentError(
                f"{self.path} holds a result of other settings: {'; '.join(differing)}. Choose another --folder."
            )
        return cell["result"]


def lock_of(path: Path) -> Path:
    """The lock of a cell's file."""
    return path.with_suffix(".lock")


def work_off(works: Sequence[Work], tell: Callable[[int, dict[str, Any]], None]) -> list[dict[str, Any]]:
    """All results, each computed by one of the processes that call this at the same time.

    It takes what is free, in order, and then returns to what others held. If a process dies, what it held is free.

    Args:
        works: cells, or what else there is to do.
        tell: called with the index of a work and its result, in the order in which results are found.

    Returns:
        The results, in the order of `works`.
    """
    results: dict[int, dict[str, Any]] = {}
    waiting = False
    while len(results) < len(works):
        before = len(results)
        for place, work in enumerate(works):
            if place not in results:
                try:
                    results[place] = work.result()
                except locks.InUseError as held:
                    holder = held.holder
                    continue
                tell(place, results[place])
        if len(results) == before:
            if not waiting:
                left = len(works) - before
                say(f"Waiting for what other processes work on ({left} left): {holder}.")
            waiting = True
            time.sleep(PAUSE)
    return [results[place] for place in range(len(works))]


def by_key(
    keyed: Sequence[tuple[Hashable, Cell]], console: Console, told: Callable[[dict[str, Any]], str]
) -> dict[Any, list[dict[str, Any]]]:
    """The results of cells by their keys; cells of one key differ in their seeds.

    Args:
        keyed: the cells, each after its key.
        console: on which each result is told when it is there.
        told: what is told of it, beside the name of the cell.
    """
    works = [cell for _, cell in keyed]
    results = work_off(works, lambda place, result: console.print(f"{works[place].path.stem}: {told(result)}"))
    found: dict[Any, list[dict[str, Any]]] = {}
    for (key, _), result in zip(keyed, results, strict=True):
        found.setdefault(key, []).append(result)
    return found


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the standard deviation with one degree of freedom taken off (NaN for a single value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def percent(values: Sequence[float]) -> str:
    """The mean and deviation of fractions, as a table's cell in per cent."""
    mean, deviation = mean_and_deviation(values)
    return f"{100 * mean:.2f}" + (f" ± {100 * deviation:.2f}" if len(values) > 1 else "")
