"""The `train` study: one model through plain `fit`, its Jacobian watched, its robustness reported."""

import functools
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import yaml
from rich.console import Console

import jvpreg
from experiments import data, devices, files, hosts, models, plots, robustness, tracking
from experiments.backup import Progress
from experiments.config import DataConfig, JacobianConfig, OptimizerConfig, TrainConfig, as_plain_dict
from experiments.epoch_end import EpochEnd, save_model
from experiments.errors import ExperimentError, say
from experiments.run_folder import RunFolder, is_archive

MONITOR = "val_accuracy"
"""The measure by which the best model is chosen."""


def train(config: TrainConfig) -> dict[str, Any]:
    """Train one model, or continue its training, and fill its run folder.

    Args:
        config: what to train; see `experiments.config`.

    Returns:
        The content of `result.json`: the figures after the last epoch.

    Raises:
        ExperimentError: the data or W&B is not available, or the folder does not fit or is in use; see
            `RunFolder.open`.
    """
    devices.check(config)
    if config.hosts.count > 1 and not hosts.have_joined():
        return hosts.run(config)
    if config.hosts.index > 0:
        return follow(config)
    folder = RunFolder(Path(config.folder or default_folder(config)))
    with folder.held():
        progress = folder.check(config)
        return folder.read_result() or train_on(config, folder, progress)


def train_on(config: TrainConfig, folder: RunFolder, progress: Progress) -> dict[str, Any]:
    """Train the remaining epochs of a run and report on it, in a folder that this process holds."""
    with devices.used(config):
        # All of these may fail, and must not leave a run behind that would have to be resumed.
        dataset, mode = prepare(config), tracking.mode(config.wandb)
        hosts.begin(folder)
        folder.open(progress)
        batches = training_batches(config, dataset)
        model = compiled_model(config, dataset, steps=config.epochs * len(batches))
        restore(model, folder, progress)
        run = tracking.start(config, folder, mode)
        try:
            fit(model, batches, dataset, config, folder, progress)
            save_model(model, folder.model)
        except BaseException:
            run.finish()
            raise
    try:
        result = report(dataset, config, folder)
        run.summary.update(result)
    finally:
        run.finish()
    files.write_json(folder.result, result)
    announce(folder, run)
    return result


def follow(config: TrainConfig) -> dict[str, Any]:
    """Train the remaining epochs of a run together with host 0, and write nothing of it.

    Returns:
        Nothing: host 0 has the figures.
    """
    with devices.used(config), tempfile.TemporaryDirectory(prefix="host-") as path:
        dataset = prepare(config)
        folder = RunFolder(Path(path))
        if "result" not in hosts.begin(folder):
            progress = folder.backups.progress(say) or Progress(as_plain_dict(config))
            batches = training_batches(config, dataset)
            model = compiled_model(config, dataset, steps=config.epochs * len(batches))
            folder.backups.restore(model)
            fit(model, batches, dataset, config, folder, progress)
    return {}


def prepare(config: TrainConfig) -> data.Dataset:
    """Set what applies to a whole process, and load the data.

    Raises:
        ExperimentError: the data is not available, or the devices cannot share it.
    """
    keras.utils.set_random_seed(config.seed)
    keras.config.set_dtype_policy(config.precision)
    dataset = data.load(config.data)
    devices.check_dataset(config, dataset)
    return dataset


def restore(model: jvpreg.JacobianModel, folder: RunFolder, progress: Progress) -> None:
    """Bring the model to the state that the run has reached, and look for the best model."""
    folder.backups.restore(model)
    if progress.best is None or is_archive(folder.best_model):
        return
    if progress.rows[-1][MONITOR] == progress.best:
        save_model(model, folder.best_model)
    else:
        say(f"{folder.best_model} is damaged or missing. The best model of the remaining epochs is kept.")
        progress.best = None


def trained_model(folder: str) -> keras.Model:
    """The plain model of a finished run.

    Raises:
        ExperimentError: the folder holds no finished run.
    """
    path = RunFolder(Path(folder)).model
    if not is_archive(path):
        found = "no whole model" if path.exists() else "no trained model"
        raise ExperimentError(f"there is {found} in {folder}. Expected the folder of a finished `train` run.")
    model = keras.models.load_model(path, compile=False)
    return getattr(model, "base", model)


def trained_dataset(folder: str) -> data.Dataset:
    """The data set on which a run was trained."""
    path = RunFolder(Path(folder)).config
    try:
        config = DataConfig(**yaml.safe_load(path.read_text(encoding="utf-8"))["data"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ExperimentError(
            f"{path} does not say on what data the model was trained. `train` with --resume=true mends it."
        ) from error
    return data.load(config)


def default_folder(config: TrainConfig) -> str:
    """The folder of a run whose configuration names none."""
    strength = f"strength-{config.jacobian.strength:g}"
    return f"runs/{config.data.name}_{config.model.name}_{strength}_seed-{config.seed}"


def training_batches(config: TrainConfig, dataset: data.Dataset) -> data.Batches:
    """The training batches of a run."""
    part = functools.partial(hosts.part, config.hosts)
    return data.training_batches(dataset, config.batch_size, config.seed, config.data.augment, part)


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
    """The penalty of a configuration; an empty list at strength 0."""
    if config.strength == 0:
        return []
    return [jvpreg.regularizers.JacobianNorm(config.strength, num_probes=config.num_probes, side=config.side)]


def optimizer(config: OptimizerConfig, steps: int) -> keras.optimizers.Optimizer:
    """The optimizer, with a learning rate that falls to zero along a cosine over this many steps."""
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
    progress: Progress,
) -> None:
    """Train the remaining epochs, logging to the folder and to the active W&B run."""
    is_first = config.hosts.index == 0
    if progress.stopped or progress.epochs == config.epochs:
        if not is_first:
            return
        probe, *_, logger = jacobian_callbacks(dataset, config, folder)
        for callback in (probe, logger):
            callback.set_model(model)
        logger.log_history(progress.epochs)
        return
    test = dataset.test.take(hosts.part_of_batches(config.hosts, len(dataset.test), config.batch_size))
    model.fit(
        batches,
        shuffle=False,  # the batches are shuffled already, in an order that a resumed run repeats
        validation_data=(test.images(), test.labels),
        validation_batch_size=config.batch_size // config.hosts.count,
        initial_epoch=progress.epochs,
        epochs=config.epochs,
        callbacks=callbacks(batches, dataset, config, folder, progress),
        verbose=(1 if sys.stdout.isatty() else 2) if is_first else 0,  # a progress bar in a file is only noise
    )


def callbacks(
    batches: data.Batches, dataset: data.Dataset, config: TrainConfig, folder: RunFolder, progress: Progress
) -> list[keras.callbacks.Callback]:
    """The callbacks, in an order that matters: a logger sees what those before it put into the logs."""
    probe, *readers = jacobian_callbacks(dataset, config, folder)
    shared = [batches.order_epochs(), seed_epochs(config.seed), probe, *readers]
    if config.hosts.index > 0:
        return shared
    return [
        *shared,
        # Last: an epoch counts as finished once everything else about it is on disk.
        EpochEnd(folder.backups, progress, folder.history, folder.best_model, MONITOR),
        jvpreg.callbacks.JacobianProgbarLogger(probe),
    ]


def seed_epochs(seed: int) -> keras.callbacks.Callback:
    """Seed each epoch anew: a library's own generator (for dropout on Torch) is in no backup."""

    def start(epoch: int, logs: dict | None) -> None:
        keras.utils.set_random_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))

    return keras.callbacks.LambdaCallback(on_epoch_begin=start)


def jacobian_callbacks(dataset: data.Dataset, config: TrainConfig, folder: RunFolder) -> list[keras.callbacks.Callback]:
    """The probe, which writes into the logs, and the callbacks that read it."""
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
        folder=folder.jacobian,
    )
    watching, guard = [probe], config.guard
    if guard.action != "off":
        watching.append(
            jvpreg.callbacks.JacobianGuard(
                probe, explosion=guard.explosion, collapse=guard.collapse, action=guard.action
            )
        )
    if config.hosts.index > 0:
        return watching
    return [
        *watching,
        jvpreg.callbacks.JacobianPictures(probe, folder.jacobian, every_epochs=config.probe.pictures_every),
        jvpreg.callbacks.JacobianWandbLogger(probe, every_epochs=config.probe.pictures_every, history=folder.history),
    ]


def report(dataset: data.Dataset, config: TrainConfig, folder: RunFolder) -> dict[str, Any]:
    """Draw the curves, measure the robustness of the saved model, and collect the figures."""
    history = folder.read_history()
    plots.training_curves(history, folder.curves)
    robust = robustness.evaluate(trained_model(str(folder.path)), dataset.test, config.robustness, config.seed)
    files.write_json(folder.robustness, robust)
    return {
        "strength": config.jacobian.strength,
        "epochs": config.epochs,
        "test_accuracy": history["val_accuracy"][-1],
        "test_loss": history["val_loss"][-1],
        **{key: last_measurement(history, key) for key in history if key.startswith("jacobian/")},
        "robustness": robust,
    }


def last_measurement(history: dict[str, list[float]], key: str) -> float:
    """The last value of a column that holds NaN in the epochs without a measurement."""
    return next((value for value in reversed(history[key]) if math.isfinite(value)), math.nan)


def announce(folder: RunFolder, run: Any) -> None:
    """Say where the results are."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"Run folder: {folder.path}")
    console.print(f"Curves: {folder.curves}")
    console.print(f"Weights & Biases: {tracking.whereabouts(run)}")
