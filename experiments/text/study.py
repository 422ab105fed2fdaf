"""The `text` study: a penalty, a probe and contributions by what a token embedding returned."""

import functools
import itertools
import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from rich.console import Console

import jvpreg
from experiments import cells
from experiments.config import as_plain_dict
from experiments.study import Study, one_table
from experiments.text import report
from experiments.text.config import TextConfig
from experiments.text.grammar import sentences, spelled
from experiments.text.network import EMBEDDING, network
from jvpreg.attribution import saliency

NODES = 128
"""At which gradients are integrated."""


def measured(config: TextConfig, console: Console) -> dict[str, Any]:
    """A row a strength, of the cells that are trained now or were before."""
    shared = as_plain_dict(config, without=("strengths", "seeds", "folder"))
    keyed = [
        (
            strength,
            cells.Cell(
                Path(config.folder) / "cells" / f"{report.name(strength)}, seed {seed}.json",
                {**shared, "strength": strength, "seed": seed},
                functools.partial(trained, config, strength, seed),
            ),
        )
        for strength, seed in itertools.product(config.strengths, config.seeds)
    ]

    def told(result: dict[str, Any]) -> str:
        return f"{100 * result['test_accuracy'][-1]:.1f}%, ‖J‖_F {result['norm'][-1]:.3g}"

    found = cells.by_key(keyed, console, told)
    return {"rows": [{"strength": strength, "results": results} for strength, results in found.items()]}


def trained(config: TextConfig, strength: float, seed: int) -> dict[str, Any]:
    """Train one cell.

    Returns:
        After each epoch the `train_accuracy`, the `test_accuracy`, both in [0, 1], and the mean `norm` of the Jacobian
        on test sentences; and what the first test sentences were `explained` by.
    """
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    tokens, labels = sentences(config.train_examples + config.test_examples, seed)
    train, test = np.split(tokens, [config.train_examples])
    train_labels, test_labels = np.split(labels, [config.train_examples])
    model = jvpreg.JacobianModel(network(config), seed=seed)
    steps = config.epochs * math.ceil(len(train) / config.batch_size)
    # One cotangent for the one logit: the norm is exact.
    norm = jvpreg.regularizers.JacobianNorm(strength, side="output", probes="rademacher", at=EMBEDDING)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(config.learning_rate, steps)),
        keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.BinaryAccuracy("accuracy", threshold=0.0)],
        jacobian_regularizers=[norm] if strength else [],
        jacobian_evaluate=False,
        # On a CPU a plain graph of TensorFlow is faster than XLA, without which JAX would compile nothing.
        jit_compile=keras.backend.backend() == "jax",
    )
    probe = jvpreg.callbacks.JacobianProbe(test[: config.probed], ["frobenius_norm"], at=EMBEDDING)
    logs = model.fit(
        train,
        train_labels,
        batch_size=config.batch_size,
        epochs=config.epochs,
        validation_data=(test, test_labels),
        validation_batch_size=250,
        callbacks=[probe],
        verbose=0,
    ).history
    kept = {"train_accuracy": "accuracy", "test_accuracy": "val_accuracy", "norm": "jacobian/frobenius_norm"}
    found = {ours: [float(value) for value in logs[name]] for ours, name in kept.items()}
    return {**found, "explained": explained(model.base, test[: config.shown], test_labels)}


def explained(model: keras.Model, tokens: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    """What made the logit of each sentence.

    The parts are integrated gradients from embeddings of 0, at which the logit is the `rest`. A transformer normalizes
    what it reads, so that the gradient along an embedding itself is small, and its product with it says little.

    Returns:
        For each the `words`, the `label`, the `logit`, the `parts` of the words, and the `rest`.
    """
    integrated = saliency.integrated_gradients(
        model, tokens, num_steps=NODES, at=EMBEDDING, return_convergence_delta=True
    )
    parts, errors = (ops.convert_to_numpy(found) for found in integrated)
    logits = ops.convert_to_numpy(model(tokens))[:, 0]
    rests = logits - (parts.sum(axis=1) - errors)
    words = [spelled(sentence) for sentence in tokens]
    return [
        {
            "words": spoken,
            "label": float(label[0]),
            "logit": float(logit),
            "parts": contributed[: len(spoken)].tolist(),
            "rest": float(rest),
        }
        for spoken, label, logit, contributed, rest in zip(words, labels, logits, parts, rests, strict=False)
    ]


STUDY = Study(
    "text",
    measured,
    one_table("rows", report.columns, report.caption),
    {"curves": report.curves, "tokens": report.tokens},
)
