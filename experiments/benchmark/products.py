"""`f(x)` and products as one call, and what is right, by which each call is checked before it is timed."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from experiments.benchmark import calls, competitors
from experiments.benchmark.competitors import Point, Push, Start
from experiments.benchmark.reference import float64
from experiments.verify.measure import error
from experiments.verify.products import stateless

Use = Callable[[Push, Sequence], tuple]
"""What is done with a push, from tangents: to `f(x)` and the products that are checked."""


def once(push: Push, tangents: Sequence) -> tuple:
    """All directions in one call."""
    return push(tangents)


def call(
    model: keras.Model,
    start: Start | None,
    xs: Sequence[np.ndarray],
    tangents: Sequence[np.ndarray],
    jit: bool | None,
    *,
    weights: tuple[int, ...] = (),
    training: bool = False,
    use: Use = once,
) -> Callable[[], tuple]:
    """`f(x)` and products in one compiled call, which waits; without `f(x)`, the end of the primal pass is left out.

    Args:
        model: of one output.
        start: one of `competitors`; None for `f(x)` by the model, without products.
        xs: its inputs, `(B, …)` each.
        tangents: `(P, …)`, of each weight or of each input.
        jit: see `calls.compiled`.
        weights: places, among the model's variables, of those that are pushed along; of none: the inputs.
        training: whether it runs in training mode.
        use: what is computed, of the push.
    """

    def compute(values, *tensors):
        point = Point(model, values, tensors[: len(xs)], weights, training, xla=bool(jit))
        if start is None:
            return (point.outputs(*point.primals),)
        return stateless(model, lambda: tuple(use(start(point), tensors[len(xs) :])))(values)

    return calls.prepared(model, compute, jit, [*xs, *tangents])


def by_autodiff(
    model: keras.Model,
    xs: Sequence[np.ndarray],
    tangents: Sequence[np.ndarray],
    weights: tuple[int, ...] = (),
    use: Use = once,
) -> list[np.ndarray]:
    """What a call should give: by forward autodiff that is not jitted, in the model's precision; as `call`."""
    with float64() if model.variable_dtype == "float64" else contextlib.nullcontext():
        points, rows = (
            [ops.convert_to_tensor(part, model.variable_dtype) for part in parts] for parts in (xs, tangents)
        )
        push = competitors.forward_mode(Point(model, calls.values(model), tuple(points), weights))
        return [ops.convert_to_numpy(ops.stop_gradient(tensor)) for tensor in use(push, rows)]


def worst(received: Sequence[Any], expected: Sequence[np.ndarray]) -> float:
    """The larger of the relative errors of `f(x)` and, where they are there, of the products."""
    errors = [error(ops.convert_to_numpy(tensor), right) for tensor, right in zip(received, expected, strict=False)]
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def directions(shapes: Sequence[tuple[int, ...]], num_probes: int, seed: int) -> list[np.ndarray]:
    """Random directions `(P, …)` in float32, of the first shapes first."""
    random = np.random.default_rng(seed + 1)  # not those that the inputs were drawn by
    return [random.normal(size=(num_probes, *shape)).astype("float32") for shape in shapes]
