"""Weights & Biases: online where there is a login, offline where there is none, off where that is wanted."""

import os
from typing import Any, Literal

import keras
import wandb

from experiments.config import TrainConfig, as_plain_dict
from experiments.run_folder import RunFolder


def start(config: TrainConfig, folder: RunFolder) -> Any:
    """Begin the W&B run of a training run, or go on with it.

    Args:
        config: becomes the W&B configuration.
        folder: W&B's files go into its `wandb/`; the run's identity is kept there for a resumed run.

    Returns:
        The W&B run. Its mode is on it; a disabled one swallows what is logged.
    """
    known = folder.wandb_run_id.read_text() if folder.wandb_run_id.exists() else None
    run = wandb.init(
        project=config.wandb.project,
        name=folder.path.name,
        dir=folder.path,
        config=as_plain_dict(config),
        id=known,
        resume="allow" if known else None,
        mode=_mode(config),
        settings=wandb.Settings(silent=True, console="off"),
    )
    if known and run.offline:
        # No server tells how far the run has come, and W&B would count its rows from 0 again.
        run.log({}, step=folder.finished_epochs(), commit=False)
    if not run.disabled:
        folder.wandb_run_id.write_text(run.id)
    return run


def whereabouts(run: Any) -> str:
    """One line that says where to look for a W&B run."""
    if run.disabled:
        return "off"
    if run.offline:
        files = os.path.dirname(run.dir)
        return f"offline, in {files}; upload with `wandb sync {files}`"
    return f"{run.url}, with files in {os.path.dirname(run.dir)}"


class EpochLogger(keras.callbacks.Callback):
    """Log what `WandbMetricsLogger` logs, under the same `epoch/` keys, on every Keras backend.

    W&B's own callback needs TensorFlow whatever the backend, and fails on JAX with a learning-rate schedule.

    Args:
        run: the W&B run.
    """

    def __init__(self, run: Any):
        super().__init__()
        self.run = run
        run.define_metric("epoch/epoch")
        run.define_metric("epoch/*", step_metric="epoch/epoch")

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Log one epoch."""
        learning_rate = keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)
        values = {**(logs or {}), "epoch": epoch, "learning_rate": float(learning_rate)}
        self.run.log({f"epoch/{key}": value for key, value in values.items()})


def _mode(config: TrainConfig) -> Literal["online", "offline", "disabled"] | None:
    if config.wandb.mode != "auto":
        return config.wandb.mode
    if "WANDB_MODE" in os.environ:
        return None  # W&B reads it itself
    return "online" if wandb.login(prompt=False) else "offline"
