"""The `fixed_point` study: training with and without the penalty, the gradient's error, and memory."""

from typing import Any

import keras
from rich.console import Console

import jvpreg
from experiments import data
from experiments.fixed_point import gradients, memory, network, report
from experiments.fixed_point.config import FixedPointConfig
from experiments.study import Study
from experiments.train import optimizer
from jvpreg.estimators import fixed_point_spectral_radius

RADIUS = "jacobian/radius"


def measured(config: FixedPointConfig, console: Console) -> dict[str, Any]:
    """Rows of `runs`, `gradients` and `memory`."""
    dataset = data.load(config.data)
    runs, models = [], {}
    for strength in config.strengths:
        for seed in config.seeds:
            console.print(f"training: strength {strength:g}, seed {seed}")
            models[strength], history = train(config, dataset, strength, seed)
            runs.append({"strength": strength, "seed": seed, "history": history})
    strongest = models[max(config.strengths)]
    split = dataset.train.take(slice(config.probed))
    console.print("measuring: gradients, memory")
    return {
        "runs": runs,
        "gradients": gradients.errors(strongest, split, config.tolerances),
        "memory": [
            {
                "kind": kind,
                "depth": depth,
                "bytes": memory.peak_bytes(kind, depth, config.width, config.memory_batch_size),
            }
            for kind in memory.KINDS
            for depth in config.depths
        ],
    }


def train(
    config: FixedPointConfig, dataset: data.Dataset, strength: float, seed: int
) -> tuple[keras.Model, dict[str, list[float]]]:
    """The trained model, and the history of its training."""
    keras.utils.set_random_seed(seed)
    arguments = {"tolerance": config.tolerance, "max_iterations": config.max_iterations, "unconverged": "ignore"}
    base = network.build(dataset.image_shape, dataset.num_classes, config.width, **arguments)
    batches = data.training_batches(dataset, config.batch_size, seed, config.data.augment)
    penalties = [jvpreg.regularizers.FixedPointJacobianNorm(strength)] if strength else []
    model = jvpreg.JacobianModel(base)
    model.compile(
        optimizer=optimizer(config.optimizer, config.epochs * len(batches)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jacobian_regularizers=penalties,
        jacobian_evaluate=False,
    )
    test = dataset.test.take(slice(config.evaluated))
    probe = jvpreg.callbacks.JacobianProbe(
        test.take(slice(config.probed)).images(), {"radius": fixed_point_spectral_radius}
    )
    history = model.fit(
        batches,
        shuffle=False,
        epochs=config.epochs,
        validation_data=(test.images(), test.labels),
        validation_batch_size=config.batch_size,
        verbose=0,
        callbacks=[
            batches.order_epochs(),
            jvpreg.callbacks.FixedPointMonitor(),
            probe,
        ],
    ).history
    return base, {key: [float(value) for value in values] for key, values in history.items()}


STUDY = Study("fixed_point", measured, report.page, {"fixed_point": report.figure})
