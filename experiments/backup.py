"""Backups of a training run: the whole state at the end of an epoch, in a folder that is complete or does not exist."""

import csv
import dataclasses
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import files

KEPT = 2
"""The number of backups that are kept: if the newest is damaged, the one before it is used."""

# An archive, which Python writes: HDF5 crashes the process if the disk is full.
STATE, PROGRESS = "state.keras", "progress.json"
PREFIX = "backup-"


@dataclasses.dataclass
class Progress:
    """The progress of a run.

    Attributes:
        config: the run's configuration, as `config.yaml` has it.
        rows: of the history, one for each finished epoch, by column.
        best: the best value so far of the measure by which the best model is chosen; None before the first epoch ends.
        stopped: whether training ended before its last epoch, for example by a guard.
    """

    config: dict[str, Any]
    rows: list[dict[str, float]] = dataclasses.field(default_factory=list)
    best: float | None = None
    stopped: bool = False

    @property
    def epochs(self) -> int:
        """How many epochs are finished."""
        return len(self.rows)


class Backups:
    """The backups of a run: folders `backup-00003`, by the number of finished epochs.

    A backup holds the weights, the optimizer's state, the state of the penalties (their step, multipliers and singular
    vectors) and of the seeds (those of dropout too), and the run's progress with a digest of the other file.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, model: Any, progress: Progress) -> None:
        """Back up the end of an epoch, and then remove older backups."""
        path = self.folder / f"{PREFIX}{progress.epochs:05d}"
        files.remove(path)  # of an epoch that is trained a second time, because this one is damaged
        with files.beside(path) as unfinished:
            unfinished.mkdir()
            model.save(unfinished / STATE)
            told = {"progress": dataclasses.asdict(progress), "digest": digest(unfinished / STATE)}
            files.write_json(unfinished / PROGRESS, told)
        for old in self._newest_first()[KEPT:]:
            files.remove(old)

    def progress(self, tell: Callable[[str], None]) -> Progress | None:
        """The progress in the newest whole backup; None if there is none.

        Args:
            tell: called with a message for each backup that is damaged.
        """
        found = self._newest_whole(tell)
        return found[1] if found else None

    def restore(self, model: Any) -> None:
        """Bring a compiled model to the state of the newest whole backup; do nothing if there is none."""
        found = self._newest_whole(lambda message: None)
        if found:
            # Built as in `fit`: the optimizer's variables are part of the state.
            model.optimizer.build(model.trainable_variables)
            model.load_weights(found[0] / STATE)

    def epochs(self) -> int:
        """How many epochs are backed up, by the name of the newest backup."""
        return max((int(path.name.removeprefix(PREFIX)) for path in self._newest_first()), default=0)

    def _newest_whole(self, tell: Callable[[str], None]) -> tuple[Path, Progress] | None:
        for path in self._newest_first():
            told = files.read_object(path / PROGRESS)
            try:
                if told is not None and digest(path / STATE) == told["digest"]:
                    return path, Progress(**told["progress"])
            except (FileNotFoundError, KeyError, TypeError):
                pass
            tell(f"{path} is damaged: the run goes on from where it was before.")
        return None

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob(f"{PREFIX}*"), reverse=True)


def digest(path: Path) -> str:
    """A digest that shows whether a file is complete."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_history(rows: list[dict[str, float]], path: Path) -> None:
    """Write rows as a CSV file; remove it if there are none."""
    if not rows:
        files.remove(path)
        return
    files.write_text(path, as_csv(rows))


def as_csv(rows: list[dict[str, float]]) -> str:
    """Rows as the text of a CSV file, with a line of headings; NaN for a column that a row does not have."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), "nan", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
