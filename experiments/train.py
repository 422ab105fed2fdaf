"""The `train` study: one model through plain `fit`, its Jacobian watched, its robustness reported."""

import functools
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import keras
import yaml
from rich.console import Console

import jvpreg
from experiments import data, models, plots, robustness, tracking
from experiments.config import DataConfig, JacobianConfig, OptimizerConfig, TrainConfig
from experiments.errors import ExperimentError
from experiments.run_folder import RunFolder


def train(config: TrainConfig) -> dict[str, Any]:
    """Train one model, or go on with its training, and fill its run folder.

    Args:
        config: what to train; see `experiments.config`.

    Returns:
        What `result.json` holds: the figures after the last epoch.

    Raises:
        ExperimentError: where the data cannot be had or the folder does not fit; see `RunFolder.open`.
    """
    keras.utils.set_random_seed(config.seed)
    keras.config.set_dtype_policy(config.precision)
    dataset = data.load(config.data)  # before the folder is made: it may fail
    folder = RunFolder(Path(config.folder or default_folder(config)))
    folder.open(config)
    batches = training_batches(config, dataset)
    model = compiled_model(config, dataset, steps=config.epochs * len(batches))
    run = tracking.start(config, folder)
    try:
        fit(model, batches, dataset, config, folder, run)
        result = report(model, dataset, config, folder)
        run.summary.update(result)
    finally:
        run.finish()
    announce(folder, run)
    return result


def trained_model(folder: str) -> keras.Model:
    """The plain model of a finished run.

    Raises:
        ExperimentError: the folder holds no finished run.
    """
    files = RunFolder(Path(folder))
    if not files.model.exists():
        raise ExperimentError(f"there is no trained model in {folder}. Expected the folder of a finished `train` run.")
    model = keras.models.load_model(files.model, compile=False)
    return getattr(model, "base", model)


def trained_dataset(folder: str) -> data.Dataset:
    """The data set of a run, as it was trained on."""
    settings = yaml.safe_load(RunFolder(Path(folder)).config.read_text())
    return data.load(DataConfig(**settings["data"]))


def default_folder(config: TrainConfig) -> str:
    """The folder of a run that names none."""
    strength = f"strength-{config.jacobian.strength:g}"
    return f"runs/{config.data.name}_{config.model.name}_{strength}_seed-{config.seed}"


def training_batches(config: TrainConfig, dataset: data.Dataset) -> data.Batches:
    """The training batches of a run."""
    return data.training_batches(dataset, config.batch_size, config.seed, config.data.augment)


def compiled_model(config: TrainConfig, dataset: data.Dataset, steps: int) -> jvpreg.JacobianModel:
    """The model with its penalty, ready for `fit`.

    Args:
        config: what to build.
        dataset: gives the shapes.
        steps: training steps in all, over which the learning rate falls.
    """
    model = jvpreg.JacobianModel(models.build(config.model, dataset))
    model.compile(
        optimizer=optimizer(config.optimizer, steps),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=config.jit_compile,
        jacobian_regularizers=regularizers(config.jacobian),
        jacobian_interval=config.jacobian.interval,
        jacobian_fraction=config.jacobian.fraction,
        jacobian_evaluate=False,  # the probe measures the test images' Jacobian, with an error bar
    )
    return model


def regularizers(config: JacobianConfig) -> list[jvpreg.regularizers.JacobianNorm]:
    """The penalty of a configuration; none at strength 0."""
    if config.strength == 0:
        return []
    return [jvpreg.regularizers.JacobianNorm(config.strength, num_probes=config.num_probes, side=config.side)]


def optimizer(config: OptimizerConfig, steps: int) -> keras.optimizers.Optimizer:
    """The optimizer, with a learning rate that falls to zero along a cosine in so many steps."""
    schedule = keras.optimizers.schedules.CosineDecay(config.learning_rate, steps)
    decay = config.weight_decay or None
    if config.name == "adam":
        chosen = keras.optimizers.Adam(schedule, weight_decay=decay)
    else:
        chosen = keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True, weight_decay=decay)
    if decay:
        chosen.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return chosen


def fit(
    model: jvpreg.JacobianModel,
    batches: data.Batches,
    dataset: data.Dataset,
    config: TrainConfig,
    folder: RunFolder,
    run: Any,
) -> None:
    """Train for the epochs that are left, logging to the folder and to the W&B run."""
    model.fit(
        batches,
        shuffle=False,  # the batches are shuffled, in an order that a resumed run finds again
        validation_data=(dataset.test.images(), dataset.test.labels),
        validation_batch_size=config.batch_size,
        epochs=config.epochs,
        callbacks=callbacks(batches, dataset, config, folder, run),
        verbose=1 if sys.stdout.isatty() else 2,  # a progress bar in a file is only noise
    )


def callbacks(
    batches: data.Batches, dataset: data.Dataset, config: TrainConfig, folder: RunFolder, run: Any
) -> list[keras.callbacks.Callback]:
    """The callbacks, in an order that matters: a logger sees what those before it put into the logs."""
    history = folder.read_history()
    return [
        batches.order_epochs(),
        *jacobian_callbacks(dataset, config, folder),
        keras.callbacks.CSVLogger(folder.history, append=True),
        tracking.EpochLogger(run),
        keras.callbacks.ModelCheckpoint(
            folder.best_model,
            monitor="val_accuracy",
            mode="max",
            save_best_only=True,
            initial_value_threshold=max(history.get("val_accuracy", []), default=None),
        ),
        # Last: an epoch counts as done once everything else about it is on disk.
        keras.callbacks.BackupAndRestore(folder.backup, double_checkpoint=True, delete_checkpoint=False),
    ]


def jacobian_callbacks(dataset: data.Dataset, config: TrainConfig, folder: RunFolder) -> list[keras.callbacks.Callback]:
    """The probe, which writes into the logs, and what reads it."""
    probe = jvpreg.callbacks.JacobianProbe(
        dataset.test.take(slice(config.probe.examples)).images(),
        metrics={
            "frobenius_norm": "frobenius_norm",
            "spectral_norm": "spectral_norm",
            "top_singular_values": functools.partial(
                jvpreg.estimators.top_singular_values, k=config.probe.singular_values
            ),
        },
        every_epochs=config.probe.every_epochs,
    )
    guard = config.guard
    guards = []
    if guard.action != "off":
        guards = [
            jvpreg.callbacks.JacobianGuard(
                probe, explosion=guard.explosion, collapse=guard.collapse, action=guard.action
            )
        ]
    return [
        probe,
        *guards,
        jvpreg.callbacks.JacobianPictures(probe, folder.path / "jacobian", every_epochs=config.probe.pictures_every),
        jvpreg.callbacks.JacobianWandbLogger(probe, every_epochs=config.probe.pictures_every),
    ]


def report(
    model: jvpreg.JacobianModel, dataset: data.Dataset, config: TrainConfig, folder: RunFolder
) -> dict[str, Any]:
    """Save the model, draw the curves, measure the robustness; write it all, and the result last."""
    model.save(folder.model)
    history = folder.read_history()
    plots.training_curves(history, folder.curves)
    robust = robustness.evaluate(model.base, dataset.test, config.robustness, config.seed)
    folder.robustness.write_text(json.dumps(asdict(robust), indent=2))
    result = {
        "strength": config.jacobian.strength,
        "epochs": config.epochs,
        "test_accuracy": history["val_accuracy"][-1],
        "test_loss": history["val_loss"][-1],
        **{key: last_measurement(history, key) for key in history if key.startswith("jacobian/")},
        "robustness": asdict(robust),
    }
    folder.result.write_text(json.dumps(result, indent=2))
    return result


def last_measurement(history: dict[str, list[float]], key: str) -> float:
    """The last value of a column that holds NaN in the epochs without a measurement."""
    return next((value for value in reversed(history[key]) if math.isfinite(value)), math.nan)


def announce(folder: RunFolder, run: Any) -> None:
    """Say where everything is."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"Run folder: {folder.path}")
    console.print(f"Curves: {folder.curves}")
    console.print(f"Weights & Biases: {tracking.whereabouts(run)}")
