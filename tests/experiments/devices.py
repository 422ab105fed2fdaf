"""What `tests/experiments/test_devices.py` runs in a process of its own: `python -m tests.experiments.devices FOLDER`.

A second word is the layout, as JSON. The process trains on one device and on two, and writes both results.
"""

import json
import sys
from pathlib import Path

import numpy as np


def config(folder: Path, count: int, layout=None):
    from experiments.config import (
        DataConfig,
        JacobianConfig,
        ModelConfig,
        ProbeConfig,
        RobustnessConfig,
        TrainConfig,
        WandbConfig,
    )

    return TrainConfig(
        data=DataConfig(train_examples=40),
        model=ModelConfig(name="mlp", width=8),
        jacobian=JacobianConfig(strength=0.01),
        probe=ProbeConfig(examples=4, singular_values=2, pictures_every=9),
        robustness=RobustnessConfig(examples=4, noise=[0.1], epsilons=[0.1], pgd_steps=1),
        wandb=WandbConfig(mode="disabled"),
        epochs=1,
        batch_size=16,
        devices=count,
        layout=layout,
        folder=str(folder),
    )


def numbers(folder: Path) -> dict:
    """What came out of a run."""
    import keras

    result = json.loads((folder / "result.json").read_text())
    weights = keras.models.load_model(folder / "model.keras", compile=False).base.get_weights()
    found = {key: value for key, value in result.items() if isinstance(value, float)}
    return found | {f"weight {i}": np.asarray(weight).tolist() for i, weight in enumerate(weights)}


def main(folder: str, layout: str = "null") -> None:
    from experiments import train

    found = []
    for count in (2, 1):  # the devices are made when the first run starts
        path = Path(folder) / str(count)
        train.train(config(path, count, json.loads(layout) if count == 2 else None))
        found.append(numbers(path))
    (Path(folder) / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
