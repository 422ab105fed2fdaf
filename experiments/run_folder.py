"""A run's folder: what it holds, and whether a run may start or continue there.

config.yaml       the configuration
history.csv       a row an epoch
curves.png        loss, accuracy and Jacobian over the epochs
jacobian/         pictures of the Jacobian's spectrum over the epochs, and what was measured, by epoch
checkpoints/      best.keras, and the last two backups, from which an interrupted run continues
model.keras       the trained model
robustness.json   accuracy under noise and attack
result.json       the figures in one place; written last, so that it marks a finished run
wandb/            what Weights & Biases writes
lock              held by the process that works here; lock.json says which one that is, or was
"""

import contextlib
import csv
import io
import zipfile
from pathlib import Path
from typing import Any

import yaml

from experiments import files, locks
from experiments.backup import Backups, Progress, as_csv
from experiments.config import TrainConfig, as_plain_dict
from experiments.errors import ExperimentError, say

# A run stays the same run wherever its folder is and however often it was interrupted.
NOT_COMPARED = ("folder", "resume", "hosts.index", "hosts.address", "hosts.timeout")


class RunFolder:
    """The folder of one run.

    Args:
        path: where it is, or will be.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.history = path / "history.csv"
        self.curves = path / "curves.png"
        self.jacobian = path / "jacobian"
        self.best_model = path / "checkpoints" / "best.keras"
        self.backups = Backups(path / "checkpoints")
        self.model = path / "model.keras"
        self.robustness = path / "robustness.json"
        self.result = path / "result.json"
        self.wandb_run_id = path / "wandb" / "run_id"
        self.lock = path / "lock"

    @property
    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return self.config.exists() or any(self.best_model.parent.glob("backup-*"))

    @property
    def is_finished(self) -> bool:
        """Whether a run was finished here."""
        return self.read_result() is not None

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Keep other processes out of the folder.

        Raises:
            locks.InUseError: another process works here.
            ExperimentError: the folder is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ExperimentError(f"{self.path} is a file. Choose another folder with --folder=PATH.")
        return locks.held(self.lock, self.path)

    def check(self, config: TrainConfig) -> Progress:
        """See whether a run may start or continue here. Nothing is changed.

        Returns:
            How far the run has come.

        Raises:
            ExperimentError: the folder holds a run and is to start one, holds none and is to resume one, or holds a
                run of another configuration.
        """
        if self.holds_run and not config.resume:
            raise ExperimentError(
                f"{self.path} already holds a run. Continue it with --resume=true, or choose another folder "
                "with --folder=PATH."
            )
        if config.resume is True and not self.holds_run:
            raise ExperimentError(f"{self.path} holds no run to resume. Start one without --resume.")
        wanted = as_plain_dict(config)
        progress = self.backups.progress(say) or Progress(self._stored_config(wanted) or wanted)
        if differing := differences(progress.config, wanted):
            raise ExperimentError(
                f"{self.path} holds a run of another configuration: {'; '.join(differing)}. "
                f"Resume it with its own, --config {self.config}, or choose another --folder."
            )
        return progress

    def open(self, progress: Progress) -> None:
        """Prepare the folder for a run that has made this progress, and mend damaged files. Only for its holder."""
        files.discard_unfinished(self.path)
        for unfinished in self.jacobian.glob(".*"):  # a measurement or a picture
            files.discard(unfinished)
        self._mend(self.config, yaml.safe_dump(progress.config, sort_keys=False))
        self._mend(self.history, as_csv(progress.rows) if progress.rows else None)

    def read_history(self) -> dict[str, list[float]]:
        """The columns of the history, with one value for each epoch; empty before the end of the first epoch."""
        if not self.history.exists():
            return {}
        rows = list(csv.DictReader(io.StringIO(self.history.read_text())))
        return {key: [float(row[key]) for row in rows] for key in rows[0]} if rows else {}

    def read_result(self) -> dict[str, Any] | None:
        """The figures of a finished run; None if it is not finished, or they or the model are damaged."""
        found = files.read_object(self.result)
        return found if found and "robustness" in found and is_archive(self.model) else None

    def _stored_config(self, wanted: dict[str, Any]) -> dict[str, Any] | None:
        # For a run without a backup: no epoch is lost if it starts again.
        try:
            stored = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError):
            return None
        return stored if isinstance(stored, dict) and stored.keys() == wanted.keys() else None

    def _mend(self, path: Path, text: str | None) -> None:
        """Write a file again that does not hold what it should; None: it should not be there."""
        found = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
        if found == text:
            return
        if found is not None:
            say(f"{path} does not fit the last backup: it is written again from that.")
        if text is None:
            files.remove(path)
        else:
            files.write_text(path, text)


def is_archive(path: Path) -> bool:
    """Whether a file of Keras' is whole, as far as its end tells."""
    return path.is_file() and zipfile.is_zipfile(path)


def differences(stored: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """By which keys two configurations are not of the same run."""
    differing = []
    for key in dict.fromkeys([*stored, *wanted]):
        before, now = stored.get(key), wanted.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            differing += differences(before, now, f"{prefix}{key}.")
        elif before != now and prefix + key not in NOT_COMPARED:
            differing.append(f"{prefix}{key} was {before!r} and is now {now!r}")
    return differing
