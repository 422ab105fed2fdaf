"""The `benchmark biases` study: what penalties on bias-Jacobians add to a training step."""

import functools
from typing import Any

import numpy as np
from keras import ops

from experiments.benchmark import biases_entries, checked, entries, study
from experiments.benchmark.biases_entries import ENTRIES, Entry
from experiments.benchmark.check import EXAMPLES, Check, check_gradient
from experiments.benchmark.config import BiasesConfig
from experiments.benchmark.kinks import far_from_kinks
from experiments.benchmark.reference import Reference, float64
from experiments.data import Split


def check(entry: Entry, config: BiasesConfig) -> Check:
    """Whether an entry, compiled as it is timed, trains on the penalty that it claims to."""
    model = biases_entries.training_model(entry, config, strength=1.0, **entries.penalty_alone())
    split = checked_images(config)
    return check_gradient(model, split.images(), split.labels, functools.partial(exact_penalty, entry, config))


def checked_images(config: BiasesConfig) -> Split:
    """The images at which entries are checked."""
    return far_from_kinks(entries.images(config, config.batch_size), [biases_entries.plain_model(config)], EXAMPLES)


def exact_penalty(entry: Entry, config: BiasesConfig, moved: list[np.ndarray]) -> float:
    """The penalty in float64, by one reverse pass that is not jitted, at the weights moved by so much."""
    split = checked_images(config)
    exact = Reference(biases_entries.plain_model(config), "moving", split.images())
    with float64():
        for variable, weight, change in zip(exact.model.trainable_variables, exact.weights, moved, strict=True):
            variable.assign(weight + change)
        names = biases_entries.convolutions(exact.model, entry)
        outputs, gradients, _ = biases_entries.differentiable(exact.model.layers[1:], exact.x, names)
        at_input, at_layers = gradients(ops.one_hot(split.labels, outputs.shape[1], dtype="float64"))
        biases = {layer.name: layer.bias for layer in exact.model.layers if layer.name in names}
        total = sum(biases_entries.squares(at_layers[name] * ops.convert_to_tensor(b)) for name, b in biases.items())
        if entry.with_input:
            total = total + biases_entries.squares(at_input)
        return float(ops.mean(total))


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    return (
        f"{study.subject(settings)}, biases and no normalization; the label's logit. Ratios to the plain step of the "
        f"same round, median and quartiles of {settings['rounds']} rounds. Errors are relative, of one step's penalty "
        "and of its gradient by the weights, against one reverse pass in float64 that is not jitted; above "
        f"{settings['tolerance']:g} a step is wrong and is not timed. First s: seconds of the first call, compilation "
        f"included. {study.ran_on(summary)}"
    )


NAMED = {entry.name: entry for entry in ENTRIES}

STUDY = checked.benchmark(
    "biases",
    {name: entry.label for name, entry in NAMED.items()},
    lambda name, config: check(NAMED[name], config),
    lambda name, config: biases_entries.training_model(NAMED[name], config),
    caption,
)
