"""Attributions by gradients: of images, of vectors, of the embeddings of tokens, and of several inputs at once."""

from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from jvpreg.attribution.subject import Reduction, Subject, check_channels, in_batches
from jvpreg.common import checks, seeds
from jvpreg.common.typing import Structure, Tensor
from jvpreg.engine.node import Node

Method = Literal["gausslegendre", "riemann_middle"]


def input_gradient(
    model: keras.Layer,
    x: Structure,
    target: Structure | None = None,
    at: str | None = None,
    reduce: Reduction | None = "abs",
    batch_size: int | None = None,
) -> Structure:
    """The gradient at each pixel in absolute values: `Σ_c |∇ₓ f|`; for tokens, see `at` and `reduce="norm"`.

    Args:
        model: a Keras model.
        x: its input: images `(B, H, W, C)`, any other tensor `(B, …)`, or a structure of inputs.
        target: which output: see `jvpreg.full_jacobian`.
        at: the path of a layer, such as an embedding `(B, T, E)`: attributions are for what it returned.
        reduce: what becomes of the channels, or of the entries of an embedding: `"abs"` sums their absolute values,
            `"sum"` sums them, `"norm"` takes their Euclidean norm; None returns the gradient itself, like `x`. The
            features of a vector `(B, D)` are kept in any case.
        batch_size: how many examples are computed at once; by default all.

    Returns:
        The map `(B, H, W)`, or `(B, T)` for tokens; for several inputs, a structure of maps like `x`, where an input of
        whole numbers has zeros. Tokens that a mask hides from the layers have exactly zero.

    Raises:
        ValueError: an argument does not fit.

    Reference: Simonyan, Vedaldi & Zisserman (2014), "Deep inside convolutional networks".

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((6,), dtype="int32"), keras.layers.Embedding(50, 4, name="embedding"),
    ...     keras.layers.LSTM(3), keras.layers.Dense(2)])
    >>> ids = np.array([[1, 2, 3, 4, 5, 6]])
    >>> gradient = jvpreg.attribution.saliency.input_gradient
    >>> tuple(gradient(model, ids, at="embedding", reduce="norm").shape)
    (1, 6)
    >>> tuple(gradient(model, ids, at="embedding", reduce=None).shape)
    (1, 6, 4)
    """
    check_channels(reduce)
    return in_batches(lambda subject: subject.packed(subject.gradient(), reduce), model, x, target, at, batch_size)


def gradient_times_input(
    model: keras.Layer,
    x: Structure,
    target: Structure | None = None,
    at: str | None = None,
    reduce: Reduction | None = "sum",
    batch_size: int | None = None,
) -> Structure:
    """The gradient times the input, summed over channels: `Σ_c x ⊙ ∇ₓ f`, with its sign.

    It is what the input, or each token, contributes to the output: with the intercepts of the layers, these parts sum
    to the output exactly. `jvpreg.full_jacobian` has the intercepts.

    Args:
        model: a Keras model.
        x: its input, as `input_gradient` takes it.
        target: which output: see `jvpreg.full_jacobian`.
        at: the path of a layer, as `input_gradient` takes it.
        reduce: of the channels, as in `input_gradient`.
        batch_size: how many examples are computed at once; by default all.

    Returns:
        What `input_gradient` returns, with signs.

    Raises:
        ValueError: an argument does not fit.

    Reference: Shrikumar, Greenside & Kundaje (2017), "Learning important features through propagating activation
    differences", section 2.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> products = jvpreg.attribution.saliency.gradient_times_input(model, np.array([[1.0, -2.0, 3.0]]))
    >>> keras.ops.convert_to_numpy(products).tolist()
    [[1.0, -2.0, 3.0]]
    """
    check_channels(reduce)

    def product(subject: Subject) -> Structure:
        pairs = zip(subject.points, subject.gradient(), strict=True)
        return subject.packed([ops.cast(point, slope.dtype) * slope for point, slope in pairs], reduce)

    return in_batches(product, model, x, target, at, batch_size)


def integrated_gradients(
    model: keras.Layer,
    x: Structure,
    target: Structure | None = None,
    baseline: Structure = 0.0,
    num_steps: int = 32,
    method: Method = "gausslegendre",
    at: str | None = None,
    reduce: Reduction | None = "sum",
    batch_size: int | None = None,
    return_convergence_delta: bool = False,
) -> Structure:
    """The gradient averaged on the line from a baseline to the input, times their difference: `Σ_c (x − x₀) ⊙ ∫ ∇f`.

    Args:
        model: a Keras model.
        x: its input, as `input_gradient` takes it.
        target: which output: see `jvpreg.full_jacobian`; by default the largest output at `x`.
        baseline: x₀: a number, or an array that broadcasts to `x`; for several inputs, also a structure of these like
            `x`. With `at`, it is in the space of the layer's output.
        num_steps: points of the rule; each costs a primal and a backward pass.
        method: of integration. If the model is smooth on the line, the error of `"gausslegendre"` falls exponentially:
            to 1e-8 of the output at 16 steps in a small network of tanh. `"riemann_middle"`, the midpoints of equal
            steps, leaves 3e-4 there. The gradient of a ReLU network jumps, and both leave 3e-2, and 5e-3 at 64 steps.
        at: the path of a layer, as `input_gradient` takes it.
        reduce: of the channels, as in `input_gradient`.
        batch_size: how many examples are computed at once; by default all.
        return_convergence_delta: whether to return the error of the rule too.

    Returns:
        What `input_gradient` returns, with signs: all attributions of an example sum to `f(x) − f(x₀)` up to the error
        of the rule. With `return_convergence_delta`, a pair: this, and the sum less `f(x) − f(x₀)`, `(B,)`.

    Raises:
        ValueError: an argument does not fit.

    Reference: Sundararajan, Taly & Yan (2017), "Axiomatic attribution for deep networks".

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(2)])
    >>> integrated = jvpreg.attribution.saliency.integrated_gradients
    >>> bool(keras.ops.all(integrated(model, np.ones((5, 3)), return_convergence_delta=True)[1] < 1e-5))
    True
    """
    checks.count("num_steps", num_steps)
    checks.choice("method", method, ("gausslegendre", "riemann_middle"))
    checks.boolean("return_convergence_delta", return_convergence_delta)
    check_channels(reduce)

    def integrated(subject: Subject) -> Structure:
        starts = _baselines(baseline, subject, x)
        parts = _integrated(subject, starts, _rule(method, num_steps))
        found = subject.packed(parts, reduce)
        if not return_convergence_delta:
            return found
        return found, subject.known(_total(parts) - (subject.value() - subject.value(starts)))

    return in_batches(integrated, model, x, target, at, batch_size)


def smooth_grad(
    model: keras.Layer,
    x: Structure,
    target: Structure | None = None,
    noise: float = 0.15,
    num_samples: int = 16,
    seed: int = 0,
    at: str | None = None,
    reduce: Reduction | None = "abs",
    batch_size: int | None = None,
) -> Structure:
    """The gradient averaged over noisy copies of the input: the sum of its absolute values at each pixel.

    Args:
        model: a Keras model.
        x: its input, as `input_gradient` takes it.
        target: which output: see `jvpreg.full_jacobian`; by default the largest output at `x`.
        noise: standard deviation, as a part of the range of each example's input.
        num_samples: noisy copies; each costs a primal and a backward pass.
        seed: of the noise.
        at: the path of a layer, as `input_gradient` takes it.
        reduce: of the channels, as in `input_gradient`.
        batch_size: how many examples are computed at once; by default all. The noise is the same.

    Returns:
        What `input_gradient` returns.

    Raises:
        ValueError: an argument does not fit.

    Reference: Smilkov et al. (2017), "SmoothGrad".
    """
    checks.count("num_samples", num_samples)
    checks.number("noise", noise, least=0)
    seed = checks.seed("seed", seed)
    check_channels(reduce)

    def smoothed(subject: Subject) -> Structure:
        generator = seeds.generator(seed)
        total: list[Any] = [0.0] * len(subject.points)
        for _ in range(num_samples):
            noisy = [point + noise * _range(point) * _drawn(point, subject, generator) for point in subject.points]
            total = [sum_ + slope for sum_, slope in zip(total, subject.gradient(noisy), strict=True)]
        return subject.packed([sum_ / num_samples for sum_ in total], reduce)

    return in_batches(smoothed, model, x, target, at, batch_size)


def guided_backpropagation(
    model: keras.Layer,
    x: Structure,
    target: Structure | None = None,
    at: str | None = None,
    reduce: Reduction | None = "abs",
    batch_size: int | None = None,
) -> Structure:
    """The gradient at each pixel in absolute values, if every ReLU passes back positive gradients only.

    Args:
        model: a Keras model. Without a ReLU in it, this is `input_gradient`.
        x: its input, as `input_gradient` takes it.
        target: which output: see `jvpreg.full_jacobian`.
        at: the path of a layer, as `input_gradient` takes it.
        reduce: of the channels, as in `input_gradient`.
        batch_size: how many examples are computed at once; by default all.

    Returns:
        What `input_gradient` returns.

    Raises:
        ValueError: an argument does not fit.

    Reference: Springenberg et al. (2015), "Striving for simplicity: the all convolutional net".
    """
    check_channels(reduce)

    def guide(node: Node, cotangents: list) -> list:
        return [None if c is None else ops.maximum(c, 0.0) for c in cotangents] if _is_relu(node) else cotangents

    def guided(subject: Subject) -> Structure:
        found = subject.linearization.modified_vjp(subject.cotangent, guide)
        return subject.packed(subject.linearization.flatten_inputs(found), reduce)

    return in_batches(guided, model, x, target, at, batch_size)


def _total(parts: list) -> Tensor:
    """The sum of all attributions of each example, `(B,)`."""
    return sum(ops.sum(ops.reshape(part, (ops.shape(part)[0], -1)), axis=-1) for part in parts)


def _integrated(subject: Subject, starts: list, rule: list[tuple[float, float]]) -> list:
    """The attributions, a flat list like the points, by the gradients on the line from `starts` to them."""
    ways = [point - start for point, start in zip(subject.points, starts, strict=True)]
    total: list[Any] = [0.0] * len(ways)
    for node, weight in rule:
        gradient = subject.gradient([start + node * way for start, way in zip(starts, ways, strict=True)])
        total = [sum_ + weight * slope for sum_, slope in zip(total, gradient, strict=True)]
    return [ops.cast(way, sum_.dtype) * sum_ for way, sum_ in zip(ways, total, strict=True)]


def _rule(method: Method, num_steps: int) -> list[tuple[float, float]]:
    """The points of a rule on the line from 0 to 1, each with its weight; these sum to 1."""
    if method == "riemann_middle":
        return [((step + 0.5) / num_steps, 1 / num_steps) for step in range(num_steps)]
    # On [-1, 1], with weights that sum to 2.
    nodes, weights = np.polynomial.legendre.leggauss(num_steps)
    return list(zip(((nodes + 1) / 2).tolist(), (weights / 2).tolist(), strict=True))


def _baselines(baseline: Structure, subject: Subject, x: Structure) -> list:
    """The points at which integration begins, a flat list like the subject's own."""
    points = subject.points
    several = isinstance(baseline, (dict, list, tuple)) and isinstance(x, (dict, list, tuple))
    given = subject.linearization.flatten_inputs(baseline, "baseline") if several else [baseline] * len(points)
    return [_baseline(one, point, subject) for one, point in zip(given, points, strict=True)]


def _baseline(baseline: Any, point: Tensor, subject: Subject) -> Tensor:
    start = checks.tensor("baseline", baseline, dtype=point.dtype)
    shape, expected = tuple(start.shape), tuple(point.shape)
    if len(shape) == len(expected) and subject.total is not None and shape[0] == subject.total != 1:
        # One for each example of the whole batch.
        start = start[subject.start : subject.start + expected[0]]
        shape = tuple(start.shape)
    pairs = zip(shape[::-1], expected[::-1], strict=False)
    if len(shape) > len(expected) or any(a not in (1, b) for a, b in pairs):
        raise checks.invalid("baseline", f"a number, or an array that broadcasts to {expected}", baseline)
    return ops.broadcast_to(start, ops.shape(point))


def _range(point: Tensor) -> Tensor:
    """The range of each example's entries, `(B, 1, …)`."""
    axes = tuple(range(1, len(point.shape)))
    if not axes:
        return ops.zeros_like(point)
    return ops.max(point, axis=axes, keepdims=True) - ops.min(point, axis=axes, keepdims=True)


def _drawn(point: Tensor, subject: Subject, generator: Any) -> Tensor:
    """Standard normal noise like a point: a part of what is drawn for the whole batch."""
    if subject.total is None:
        return keras.random.normal(ops.shape(point), dtype=point.dtype, seed=generator)
    drawn = keras.random.normal((subject.total, *point.shape[1:]), dtype=point.dtype, seed=generator)
    return drawn[subject.start : subject.start + point.shape[0]]


def _is_relu(node: Node) -> bool:
    operation = node.operation
    function = getattr(operation, "activation", operation)
    # Keras has no public name for the operation of `keras.ops.relu` in a graph.
    is_operation = isinstance(operation, keras.layers.ReLU) or type(operation).__name__ == "Relu"
    return is_operation or function is keras.activations.relu
