"""The state of each run and each cell below a folder. It does not import Keras, and so answers at once."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments import files, locks, tables
from experiments.cells import lock_of
from experiments.errors import ExperimentError
from experiments.run_folder import RunFolder


@dataclass
class StatusConfig:
    """Show the state of each run and each cell of a study below a folder: finished, running or stopped."""

    folder: str
    """The folder of a run, of a comparison or of another study that has cells."""


def status(config: StatusConfig) -> list[dict[str, str]]:
    """Print a table with a row for each run and each cell that was begun.

    Returns:
        The rows, by the heading of the column.

    Raises:
        ExperimentError: there is neither a run nor a cell.
    """
    folder = Path(config.folder)
    rows = [*runs(folder), *cells(folder)]
    if not rows:
        raise ExperimentError(f"{folder} holds no run and no cell of a study.")
    console = tables.wide_console(160)
    console.print(tables.grid(rows))
    states = [row["state"] for row in rows]
    console.print(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states))))
    return rows


def runs(folder: Path) -> Iterator[dict[str, str]]:
    """A row for each run in a folder or in folders right below it."""
    for path in [folder, *sorted(folder.glob("*/"))]:
        run = RunFolder(path)
        if run.holds_run or locks.is_held(run.lock):
            yield row(path.name or str(path), run.is_finished, run.lock, epochs(run))


def cells(folder: Path) -> Iterator[dict[str, str]]:
    """A row for each cell in a study's folder, or in its `cells/`."""
    places = [path for path in (folder, folder / "cells") if path.name == "cells" and path.is_dir()]
    for place in places:
        begun = {path.name.removesuffix(".json").removesuffix(".lock") for path in place.iterdir()}
        for name in sorted(name for name in begun if not name.startswith(files.UNFINISHED)):
            path = place / f"{name}.json"
            yield row(name, "result" in (files.read_object(path) or {}), lock_of(path), "")


def row(name: str, finished: bool, lock: Path, epochs: str) -> dict[str, str]:
    """One row of the table."""
    running = not finished and locks.is_held(lock)
    holder = locks.last_holder(lock)
    told = [holder.host, str(holder.pid), holder.since] if holder.pid else ["", "", ""]
    return {
        "run": name,
        "state": "finished" if finished else "running" if running else "stopped",
        "epochs": epochs,
        **dict(zip(("host", "process", "since"), told, strict=True)),
    }


def epochs(run: RunFolder) -> str:
    """How many epochs of a run are finished, and how many there are."""
    done = run.backups.epochs()
    try:
        config: Any = yaml.safe_load(run.config.read_text(encoding="utf-8"))
        return f"{done} of {config['epochs']}"
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return str(done)
