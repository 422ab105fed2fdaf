"""Norms of the Jacobian by random probes."""

import math
from typing import Literal

from keras import ops, tree

from jvpreg import probes
from jvpreg.estimators.result import Estimate
from jvpreg.linearization import Linearization


def squared_norm(products):
    """`‖·‖²` of each probe's product with each example: a structure of `(P, B, …)` to `(P, B)`."""
    return sum(ops.sum(ops.square(ops.reshape(t, (*ops.shape(t)[:2], -1))), axis=-1) for t in tree.flatten(products))


def frobenius_norm(
    linearization: Linearization,
    num_probes: int = 16,
    side: Literal["input", "output"] | None = None,
    seed=0,
) -> Estimate:
    """`‖J‖_F` of each example.

    Args:
        linearization: from `jvpreg.linearize`.
        num_probes: products an example. With as many as the side has dimensions, or more, the canonical basis is
            used and the norm is exact.
        side: `"input"` pushes directions forward, `"output"` pulls cotangents back; by default the side of smaller
            dimension.
        seed: an integer or a `keras.random.SeedGenerator`.

    Returns:
        An `Estimate`. Below the exact number of probes, `value` is the root of an unbiased estimate of `‖J‖_F²`,
        `sem` its standard error over the probes to first order.

    Raises:
        ValueError: `num_probes` is less than 2 and not exact, or `side` is unknown.

    Reference: Balestriero & Baraniuk (2021), equation 13.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, kernel_initializer="ones")])
    >>> estimate = jvpreg.estimators.frobenius_norm(jvpreg.linearize(model, np.zeros((1, 3))))
    >>> [round(float(keras.ops.convert_to_numpy(part)[0]), 4) for part in (estimate.value, estimate.sem)]
    [2.4495, 0.0]
    """
    if side not in ("input", "output", None):
        raise ValueError(f'Invalid value for argument `side`. Expected "input", "output" or None. Received: {side!r}')
    if side is None:
        inputs, outputs = probes.dimension(linearization.inputs), probes.dimension(linearization.outputs)
        side = "output" if outputs <= inputs else "input"
    space = linearization.outputs if side == "output" else linearization.inputs
    product = linearization.vjp if side == "output" else linearization.jvp
    size = probes.dimension(space)
    if num_probes >= size:
        value = ops.sqrt(ops.sum(squared_norm(product(probes.basis(space))), axis=0))
        return Estimate(value, ops.zeros_like(value), ops.zeros_like(value), size)
    if num_probes < 2:
        raise ValueError(
            f"Invalid value for argument `num_probes`. Expected at least 2: one probe has no standard error. "
            f"Received: num_probes={num_probes}"
        )
    squares = squared_norm(product(probes.draw("sphere", space, num_probes, seed)))
    value = ops.sqrt(ops.mean(squares, axis=0))
    deviation = ops.std(squares, axis=0) * math.sqrt(num_probes / (num_probes - 1))
    # The square root's own slope, 1 / (2 value), carries the error over; a zero norm has none.
    sem = deviation / math.sqrt(num_probes) / ops.where(value > 0, 2 * value, 1.0)
    return Estimate(value, sem, ops.zeros_like(value), num_probes)
