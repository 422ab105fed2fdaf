"""What is written at the end of an epoch: the best model, the backup and the history."""

from pathlib import Path
from typing import Any

import keras

from experiments import devices, files
from experiments.backup import Backups, Progress, write_history


class EpochEnd(keras.callbacks.Callback):
    """Keeps the history, the best model and the backups of a run; the last callback, which ends an epoch.

    An epoch that the process did not live to back up is trained again, to the same end, and what it had written is
    written again.

    Args:
        backups: the run's.
        progress: how far the run has come; each epoch's row of `logs` is added to it.
        history: the CSV file, written whole.
        best_model: the file of the model with the highest `monitor`.
        monitor: a name in `logs`.
    """

    def __init__(self, backups: Backups, progress: Progress, history: Path, best_model: Path, monitor: str):
        super().__init__()
        self.backups, self.progress = backups, progress
        self.history, self.best_model, self.monitor = history, best_model, monitor

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Write all of it, the history last, which a resumed run writes again from the backup."""
        values = logs or {}
        learning_rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        numbers = {key: float(value) for key, value in values.items()}
        self.progress.rows.append({"epoch": epoch, **numbers, "learning_rate": learning_rate})
        if self.progress.best is None or numbers[self.monitor] > self.progress.best:
            self.progress.best = numbers[self.monitor]
            save_model(self.model, self.best_model)
        self.progress.stopped = bool(self.model.stop_training)
        with devices.undistributed():
            self.backups.save(self.model, self.progress)
        write_history(self.progress.rows, self.history)


def save_model(model: keras.Model, path: Path) -> None:
    """Save a model with all that it was compiled with."""
    with files.beside(path) as unfinished, devices.undistributed():
        model.save(unfinished)
