"""The `sparing` study: norms and accuracies by how much of the penalty is computed."""

import dataclasses
import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from rich.console import Console

import jvpreg
from experiments import cells, data, models
from experiments.config import as_plain_dict
from experiments.sparing.config import SparingConfig
from experiments.study import Study, one_table, ran_on
from experiments.train import optimizer

PROBED_AT_ONCE = 64


@dataclass(frozen=True)
class Method:
    """How much of the penalty is computed; none of it at strength 0."""

    name: str
    strength: float
    interval: int = 1
    fraction: float = 1.0


def methods(config: SparingConfig) -> list[Method]:
    """The rows of the table."""
    return [
        Method("no penalty", 0.0),
        Method("every step", config.strength),
        *(Method(f"interval={k}", config.strength, interval=k) for k in config.intervals),
        *(Method(f"fraction={part:g}", config.strength, fraction=part) for part in config.fractions),
    ]


def measured(config: SparingConfig, console: Console) -> dict[str, Any]:
    """A row a method, of the cells that are trained now or were before."""
    dataset = data.load(config.data)
    listed = [
        cells.Cell(
            Path(config.folder) / "cells" / f"{method.name}, seed {seed}.json",
            settings(config, method, seed),
            functools.partial(trained, config, method, dataset, seed),
        )
        for method, seed in itertools.product(methods(config), config.seeds)
    ]

    def told(result: dict[str, Any]) -> str:
        return f"{100 * result['test_accuracy']:.2f}%, ‖J‖_F {result['frobenius_norm']:.3g}"

    found = cells.by_key([(cell.settings["method"]["name"], cell) for cell in listed], console, told)
    return {"rows": [{"method": name, "results": results} for name, results in found.items()]}


def settings(config: SparingConfig, method: Method, seed: int) -> dict[str, Any]:
    """All that the result of a cell depends on."""
    shared = as_plain_dict(config, without=("strength", "intervals", "fractions", "seeds", "folder"))
    return {**shared, "method": dataclasses.asdict(method), "seed": seed}


def trained(config: SparingConfig, method: Method, dataset: data.Dataset, seed: int) -> dict[str, Any]:
    """Train one cell.

    Returns:
        The accuracy in [0, 1] and the mean of `‖J‖_F`, both on test images.
    """
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    batches = data.training_batches(dataset, config.batch_size, seed, config.data.augment)
    model = jvpreg.JacobianModel(models.build(config.model, dataset), seed=seed)
    model.compile(
        optimizer=optimizer(config.optimizer, config.epochs * len(batches)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=config.jit_compile,
        jacobian_regularizers=[jvpreg.regularizers.JacobianNorm(method.strength)] if method.strength else [],
        jacobian_interval=method.interval,
        jacobian_fraction=method.fraction,
        jacobian_evaluate=False,
    )
    model.fit(batches, shuffle=False, epochs=config.epochs, callbacks=[batches.order_epochs()], verbose=0)
    tested = model.evaluate(dataset.test.images(), dataset.test.labels, batch_size=250, verbose=0, return_dict=True)
    parts = dataset.test.take(slice(config.probed)).parts(PROBED_AT_ONCE)
    norms = np.concatenate([frobenius_norm(model, part.images(), dataset.num_classes) for part in parts])
    return {"test_accuracy": tested["accuracy"], "frobenius_norm": float(np.mean(norms))}


def frobenius_norm(model: keras.Model, images: np.ndarray, num_classes: int) -> np.ndarray:
    """`‖J‖_F` of each image, exactly: by a product for each logit."""
    estimate = jvpreg.estimators.frobenius_norm(jvpreg.linearize(model, images), num_classes, side="output")
    return keras.ops.convert_to_numpy(estimate.value)


def columns(row: dict[str, Any]) -> dict[str, str]:
    """One method, by the heading of its column."""
    norm, deviation = cells.mean_and_deviation([one["frobenius_norm"] for one in row["results"]])
    return {
        "method": row["method"],
        "‖J‖_F": f"{norm:.3g}" + (f" ± {deviation:.2g}" if len(row["results"]) > 1 else ""),
        "test accuracy": cells.percent([one["test_accuracy"] for one in row["results"]]),
    }


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    images, model, trained_by = settings["data"], settings["model"], settings["optimizer"]
    return (
        f"Mean ± deviation over seeds {', '.join(map(str, settings['seeds']))} after {settings['epochs']} epochs of "
        f"{images['train_examples'] or 'all'} {'augmented ' if images['augment'] else ''}images of {images['name']} in "
        f"batches of {settings['batch_size']}; {model['name'].upper()} of width {model['width']}, {trained_by['name']} "
        f"{trained_by['learning_rate']:g} falling along a cosine. Penalty: {settings['strength']:g} × the mean of "
        f"‖J‖_F², one random direction an example. ‖J‖_F: the mean over {settings['probed']} test images (or all of "
        "them), of the whole Jacobian of the logits. Accuracy in %, on all test images. "
        f"{ran_on(summary)}"
    )


STUDY = Study("sparing", measured, one_table("rows", columns, caption))
