"""Wait for an offline W&B run to be on disk."""

import time
from pathlib import Path

from tests.experiments import wandb_records


def written(folder: Path) -> Path:
    """The file of the newest run in a `wandb/` folder, once its end is in it: `finish` does not wait for that."""
    file = max(folder.glob("offline-run-*/*.wandb"))
    deadline = time.monotonic() + 30
    while not any(record.HasField("exit") for record in wandb_records.records(file)):
        assert time.monotonic() < deadline, f"{file} was not finished"
        time.sleep(0.02)
    return file
