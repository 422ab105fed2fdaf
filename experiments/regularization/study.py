"""The `regularization` study: table 4 of Srinivas & Fleuret (2018), with what it may take to explain it."""

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from rich.console import Console

import jvpreg
from experiments import cells, data, models
from experiments.config import as_plain_dict
from experiments.regularization.config import RegularizationConfig
from experiments.study import Rows, Study, ran_on
from experiments.train import optimizer
from jvpreg.attribution.decomposition import as_cotangent

PAPER = {
    "no regularization": {"50": "33.25 ± 0.6", "100": "46.24 ± 0.1", "500": "68.48 ± 0.1"},
    "dropout 0.5": {"50": "35.04 ± 0.6", "100": "47.62 ± 0.7", "500": "70.14 ± 0.06"},
    "bias weight decay 0.1": {"50": "34.17 ± 0.2", "100": "47.29 ± 0.7", "500": "68.75 ± 0.04"},
    "bias-Jacobian 100": {"50": "36.02 ± 0.08", "100": "48.76 ± 0.1", "500": "71.49 ± 0.02"},
}
"""Table 4 of Srinivas & Fleuret (2018): CIFAR-100, mean and deviation of two runs."""


@dataclass(frozen=True)
class Method:
    """One way to regularize the last convolution, and how much."""

    name: str
    dropout: float = 0.0
    bias_decay: float = 0.0
    bias_jacobian: float = 0.0


def methods(config: RegularizationConfig) -> list[Method]:
    """The rows of the table."""
    return [
        Method("no regularization"),
        *(Method(f"dropout {rate:g}", dropout=rate) for rate in config.dropout),
        *(Method(f"bias weight decay {weight:g}", bias_decay=weight) for weight in config.bias_decay),
        *(Method(f"bias-Jacobian {strength:g}", bias_jacobian=strength) for strength in config.bias_jacobian),
    ]


def measured(config: RegularizationConfig, console: Console) -> dict[str, Any]:
    """A row a method, of the cells that are trained now or were before."""
    dataset = data.load(dataclasses.replace(config.data, train_examples=None))
    subsets = {n: data.balanced_subset(dataset, n * dataset.num_classes) for n in config.examples_per_class}
    listed = [
        cells.Cell(
            Path(config.folder) / "cells" / f"{method.name}, {count} a class, seed {seed}.json",
            settings(config, method, count, seed),
            functools.partial(trained, config, method, subsets[count], seed),
        )
        for count, method, seed in itertools.product(subsets, methods(config), config.seeds)
    ]
    keyed = [((cell.settings["method"]["name"], cell.settings["examples_per_class"]), cell) for cell in listed]
    found = cells.by_key(keyed, console, lambda result: f"{100 * result['test_accuracy']:.2f}% of the test images")
    return {
        "rows": [
            {"method": method.name, "columns": {str(count): found[method.name, count] for count in subsets}}
            for method in methods(config)
        ]
    }


def settings(config: RegularizationConfig, method: Method, count: int, seed: int) -> dict[str, Any]:
    """All that the result of a cell depends on."""
    varied = ("examples_per_class", "seeds", "dropout", "bias_decay", "bias_jacobian", "folder")
    shared = as_plain_dict(config, without=varied)
    return {**shared, "method": dataclasses.asdict(method), "examples_per_class": count, "seed": seed}


def trained(config: RegularizationConfig, method: Method, dataset: data.Dataset, seed: int) -> dict[str, Any]:
    """Train one cell.

    Returns:
        Accuracies in [0, 1], the training loss without penalties, and the mean of `‖f^b‖²` on test images.
    """
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    base = models.build(dataclasses.replace(config.model, dropout=method.dropout), dataset)
    layer = last_biased_layer(base)
    if method.bias_decay:
        bias = layer.beta if isinstance(layer, keras.layers.BatchNormalization) else layer.bias
        bias.regularizer = keras.regularizers.L2(method.bias_decay)
    penalty = jvpreg.regularizers.BiasJacobianNorm(method.bias_jacobian, layers=[layer.name])
    batches = data.training_batches(dataset, config.batch_size, seed, config.data.augment)
    epochs = math.ceil(config.steps / len(batches))
    model = jvpreg.JacobianModel(base, seed=seed)
    model.compile(
        optimizer=optimizer(config.optimizer, epochs * len(batches)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy", keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="cross_entropy")],
        jit_compile=config.jit_compile,
        jacobian_regularizers=[penalty] if method.bias_jacobian else [],
        jacobian_evaluate=False,
    )
    history = model.fit(batches, shuffle=False, epochs=epochs, callbacks=[batches.order_epochs()], verbose=0).history
    tested = model.evaluate(dataset.test.images(), dataset.test.labels, batch_size=250, verbose=0, return_dict=True)
    return {
        "test_accuracy": tested["accuracy"],
        "test_cross_entropy": tested["cross_entropy"],
        "train_accuracy": history["accuracy"][-1],
        "train_cross_entropy": history["cross_entropy"][-1],
        "bias_jacobian_norm_squared": bias_jacobian_norm_squared(
            base, layer.name, dataset.test.take(slice(config.probed))
        ),
    }


def last_biased_layer(model: keras.Model) -> keras.Layer:
    """The last convolution, or the normalization after it, whose offset is its bias."""
    kinds = (keras.layers.Conv2D, keras.layers.BatchNormalization)
    return [layer for layer in model.layers if isinstance(layer, kinds)][-1]


def bias_jacobian_norm_squared(model: keras.Model, layer: str, split: data.Split, batch_size: int = 128) -> float:
    """The mean of `‖f^b‖²` of a layer, for the labels' logits, in inference mode."""
    total = 0.0
    for part in split.parts(batch_size):
        lin = jvpreg.linearize(model, part.images())
        # Of one layer: the whole full-Jacobian would go back to the input.
        _, found = lin.bias_jacobians(as_cotangent(lin.outputs, part.labels), [layer], with_inputs=False)
        total += float(np.sum(keras.ops.convert_to_numpy(found[layer]).astype("float64") ** 2))
    return total / len(split)


def accuracies(row: dict[str, Any]) -> dict[str, str]:
    """One method's accuracies and the paper's, by the heading of their column."""
    paper = PAPER.get(row["method"], {})
    measured = {
        f"{count} a class": cells.percent([one["test_accuracy"] for one in results])
        for count, results in row["columns"].items()
    }
    return {"method": row["method"], **measured, **{f"paper, {n}": paper.get(n, "–") for n in row["columns"]}}


def explanations(row: dict[str, Any]) -> dict[str, str]:
    """How well one method's models know what they were trained on, and how large their bias-Jacobians are."""
    train, norms = (
        {count: float(np.mean([one[key] for one in results])) for count, results in row["columns"].items()}
        for key in ("train_accuracy", "bias_jacobian_norm_squared")
    )
    return {
        "method": row["method"],
        **{f"train, {count}": f"{100 * value:.1f}" for count, value in train.items()},
        **{f"‖f^b‖², {count}": f"{value:.1g}" for count, value in norms.items()},
    }


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    return (
        f"Test accuracy in %, mean ± deviation over seeds {', '.join(map(str, settings['seeds']))}, by training "
        "examples a class; paper: table 4 of Srinivas & Fleuret (2018), on CIFAR-100 with a VGG "
        "of a size that is not given. train: accuracy in the last epoch, on augmented images and "
        "under dropout. ‖f^b‖²: the mean over "
        f"{settings['probed']} test images of the last convolution's bias-Jacobian, for the label's logit. "
        f"{settings['model']['name'].upper()} of width {settings['model']['width']}, {settings['data']['name']}, "
        f"{settings['steps']} steps of {settings['batch_size']} examples, {settings['optimizer']['name']} "
        f"{settings['optimizer']['learning_rate']:g} falling along a cosine. "
        f"{ran_on(summary)}"
    )


def page(summary: dict[str, Any]) -> list[Rows | str]:
    """The tables, and what they mean."""
    return [*([columns(row) for row in summary["rows"]] for columns in (accuracies, explanations)), caption(summary)]


STUDY = Study("regularization", measured, page)
