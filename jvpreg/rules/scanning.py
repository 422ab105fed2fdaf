"""A scan over steps that runs on each backend, under XLA, and has a gradient on each."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops, tree

from jvpreg.rules.folding import align


def scan_steps(step: Callable, carried, inputs, like: list):
    """`step(carried, x) -> (carried, outputs)` over the first axis of `inputs`; `like`: outputs of one step."""
    if keras.backend.backend() != "tensorflow":
        return ops.scan(step, carried, inputs)

    import tensorflow as tf

    # On TensorFlow, Keras' scan takes only outputs with the shapes of the carry, and has no gradient under XLA.
    first = tuple(tree.flatten(carried)), tuple(ops.zeros_like(y) for y in like)

    def both(pair, x):
        following, outputs = step(tree.pack_sequence_as(carried, pair[0]), x)
        return tuple(tree.flatten(following)), tuple(outputs)

    states, outputs = tf.scan(both, inputs, first)
    return tree.pack_sequence_as(carried, [state[-1] for state in states]), outputs


def plus_parts(images: Sequence, weights: Sequence[tuple], residuals: Sequence) -> list[Any]:
    """The tangents of a step's outputs, plus those by its weights, which are pairs of a `part` and a tangent."""
    for part, u in weights:
        images = [a + align(b, len(a.shape)) for a, b in zip(images, part(u, *residuals), strict=True)]
    return list(images)


def next_axes(axes: Sequence[int | None]) -> list[int | None]:
    """The axes of the examples once the steps are stacked before them."""
    return [None if axis is None else axis + 1 for axis in axes]
