"""A run's folder: what lies where in it, and whether a run may start or continue there.

config.yaml       the configuration
history.csv       a row an epoch
curves.png        loss, accuracy and Jacobian over the epochs
jacobian/         pictures of the Jacobian's spectrum over the epochs
checkpoints/      best.keras, and backup/, from which an interrupted run continues
model.keras       the trained model
robustness.json   accuracy under noise and attack
result.json       the figures in one place; written last, so that it marks a finished run
wandb/            what Weights & Biases writes
"""

import csv
import json
from pathlib import Path
from typing import Any

import yaml

from experiments.config import TrainConfig, as_plain_dict
from experiments.errors import ExperimentError

# A run is the same run wherever its folder lies and however often it was interrupted.
NOT_COMPARED = ("folder", "resume")


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
        self.best_model = path / "checkpoints" / "best.keras"
        self.backup = path / "checkpoints" / "backup"
        self.model = path / "model.keras"
        self.robustness = path / "robustness.json"
        self.result = path / "result.json"
        self.wandb_run_id = path / "wandb" / "run_id"

    @property
    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return self.config.exists()

    @property
    def is_finished(self) -> bool:
        """Whether a run was brought to its end here."""
        return self.result.exists()

    def open(self, config: TrainConfig) -> None:
        """Prepare the folder for a new run, or for going on with the one it holds.

        Raises:
            ExperimentError: where the folder holds a run and is to start one, holds none and is to resume
                one, or holds a run of another configuration.
        """
        if config.resume:
            self._check_same_run(config)
            self._drop_unfinished_epochs()
        elif self.holds_run:
            raise ExperimentError(
                f"{self.path} already holds a run. Continue it with --resume=true, or choose another folder "
                "with --folder=PATH."
            )
        else:
            self.best_model.parent.mkdir(parents=True, exist_ok=True)
            self.wandb_run_id.parent.mkdir(exist_ok=True)
            self.config.write_text(yaml.safe_dump(as_plain_dict(config), sort_keys=False))

    def finished_epochs(self) -> int:
        """How many epochs the backup holds, which is where a resumed run goes on."""
        metadata = self.backup / "training_metadata.json"  # written by keras.callbacks.BackupAndRestore
        return int(json.loads(metadata.read_text())["epoch"]) if metadata.exists() else 0

    def read_history(self) -> dict[str, list[float]]:
        """The columns of the history, with one value an epoch; empty before the first epoch's end."""
        rows = self._history_rows()
        return {key: [float(row[key]) for row in rows] for key in rows[0]} if rows else {}

    def read_result(self) -> dict[str, Any]:
        """The figures of a finished run."""
        return json.loads(self.result.read_text())

    def _check_same_run(self, config: TrainConfig) -> None:
        if not self.holds_run:
            raise ExperimentError(f"{self.path} holds no run to resume. Start one without --resume.")
        stored, wanted = yaml.safe_load(self.config.read_text()), as_plain_dict(config)
        if differing := _differences(stored, wanted):
            raise ExperimentError(
                f"{self.path} holds a run of another configuration: {'; '.join(differing)}. "
                f"Resume it with its own, --config {self.config}, or choose another --folder."
            )

    def _drop_unfinished_epochs(self) -> None:
        # A run that dies between its log and its backup repeats an epoch that the log already has.
        rows = self._history_rows()
        kept = [row for row in rows if int(row["epoch"]) < self.finished_epochs()]
        if kept == rows:
            return
        if not kept:
            self.history.unlink()
            return
        with self.history.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(kept[0]))
            writer.writeheader()
            writer.writerows(kept)

    def _history_rows(self) -> list[dict[str, str]]:
        if not self.history.exists():
            return []
        with self.history.open(newline="") as file:
            return [row for row in csv.DictReader(file) if None not in row.values()]  # a torn last line


def _differences(stored: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    differing = []
    for key in dict.fromkeys([*stored, *wanted]):
        before, now = stored.get(key), wanted.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            differing += _differences(before, now, f"{prefix}{key}.")
        elif before != now and prefix + key not in NOT_COMPARED:
            differing.append(f"{prefix}{key} was {before!r} and is now {now!r}")
    return differing
