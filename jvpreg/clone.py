"""The clone of Balestriero & Baraniuk (2021) in its literal form, for networks written by hand in `keras.ops`.

A batch `h` is a concatenation `[x, u_1 … u_P, 0]` of parts of B examples: `((P+2)·B, …)`. Affine operations take it as
it is. A nonlinearity takes its state (a mask, a winner, statistics) from the part of `x` and applies it to all parts.
The network of both is `f_x`, the clone of `f` at `x`, and `J u = f_x(u) − f_x(0)`.

`num_probes` is P throughout, or None for one direction without a probe axis. No autodiff, no graph and no rule is
needed. For a Keras model `jvpreg.linearize` is better: it runs P + 1 examples for each of `x`, not P + 2, and loses
no digits to a difference of outputs.

Reference: Balestriero & Baraniuk (2021), "Fast Jacobian-Vector Product for Deep Networks", section 3 and appendix F.
Equation 10 is meant as `f(x) − f_x(x − u)`; the difference that is taken here is that of appendix G.

Example:

>>> import numpy as np
>>> from keras import ops
>>> from jvpreg import clone
>>> weights, bias = np.array([[1.0, 2.0], [1.0, -2.0]], "float32"), np.array([0.5, 0.5], "float32")
>>> def network(h):
...     return clone.activation(ops.matmul(h, weights) + bias)
>>> x, u = np.array([[1.0, 2.0]], "float32"), np.array([[3.0, 4.0]], "float32")
>>> y, ju = clone.unstack(network(clone.stack(x, u)))
>>> ops.convert_to_numpy(y).tolist(), ops.convert_to_numpy(ju).tolist()
([[3.5, 0.0]], [[7.0, 0.0]])
"""

import itertools
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from jvpreg.common import checks
from jvpreg.common.typing import ArrayLike, Seed, Tensor


def stack(x: ArrayLike, u: ArrayLike) -> Tensor:
    """The batch `[x, u, 0]`.

    Args:
        x: where the network is cloned, `(B, …)`.
        u: a direction like `x`, or P of them, `(P, B, …)`.

    Returns:
        `((P+2)·B, …)`, in the dtype of `x`; integers become floats.

    Raises:
        ValueError: `u` does not fit `x`.

    Reference: Balestriero & Baraniuk (2021), section 3.2, step 2.
    """
    x = checks.tensor("x", x)
    if len(x.shape) == 0 or x.shape[0] == 0:
        raise checks.invalid("x", "a batch (B, …) of one example at least", x)
    if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(x.dtype)):
        x = ops.cast(x, keras.config.floatx())
    u = checks.tensor("u", u, dtype=x.dtype)
    if tuple(x.shape) not in (tuple(u.shape), tuple(u.shape)[1:]):
        raise ValueError(
            f"Invalid value for argument `u`. Expected shape {tuple(x.shape)}, like x, or "
            f"(P, {str(tuple(x.shape))[1:-1]}) with a leading axis of P probes. "
            f"Received: u with shape {tuple(u.shape)}."
        )
    return ops.concatenate([x, ops.reshape(u, (-1, *ops.shape(x)[1:])), ops.zeros_like(x)])


def unstack(h: Tensor, num_probes: int | None = None) -> tuple[Tensor, Tensor]:
    """What a network returned for `stack(x, u)`, as `f(x)` and `J u`.

    Args:
        h: `((P+2)·B, …)`.
        num_probes: P, or None.

    Returns:
        `f(x)`, `(B, …)`, and `J u`, `(P, B, …)`, or `(B, …)` if `num_probes` is None.

    Raises:
        ValueError: the batch does not divide into P + 2 parts; so in every function below.

    Reference: Balestriero & Baraniuk (2021), section 3.2, step 3.
    """
    parts = _split(h, num_probes)
    products = parts[1:-1] - parts[-1:]
    return parts[0], products[0] if num_probes is None else products


def activation(h: Tensor, negative_slope: float = 0.0, num_probes: int | None = None) -> Tensor:
    """A piecewise-linear activation of `h`, `((P+2)·B, …)`: slope 1 where `x > 0` and `negative_slope` elsewhere.

    ReLU by default, leaky ReLU for `negative_slope > 0`, the absolute value for −1.

    Reference: Balestriero & Baraniuk (2021), equation 8 and algorithm 1.
    """
    checks.number("negative_slope", negative_slope)
    parts = _split(h, num_probes)
    return _join(ops.where(parts[:1] > 0, parts, negative_slope * parts if negative_slope else 0.0))


def max_pool(
    h: Tensor,
    pool_size: int | Sequence[int],
    strides: int | Sequence[int] | None = None,
    padding: str = "valid",
    data_format: str | None = None,
    num_probes: int | None = None,
) -> Tensor:
    """Max pooling of `h`, `((P+2)·B, *spatial, C)`, by the winners of `x`; a tie goes to the first entry.

    Other arguments as in `keras.ops.max_pool`. The spatial sizes must be known.

    Reference: Balestriero & Baraniuk (2021), appendix C and algorithm 3.
    """
    parts = _split(h, num_probes)
    rank = len(parts.shape) - 3
    for name, sizes in (("pool_size", pool_size), ("strides", strides)):
        for size in sizes if isinstance(sizes, (list, tuple)) else [sizes]:
            checks.count(name, size, optional=name == "strides")
        if isinstance(sizes, (list, tuple)) and len(sizes) != rank:
            raise checks.invalid(name, f"an integer, or {rank} of them", sizes)
    checks.choice("padding", padding, ("valid", "same"))
    checks.choice("data_format", data_format, ("channels_last", "channels_first", None))
    windows = _each(pool_size, rank)
    steps = windows if strides is None else _each(strides, rank)
    first = 3 if (data_format or keras.config.image_data_format()) == "channels_first" else 2
    widths, lengths = [(0, 0)] * len(parts.shape), []
    for axis, window, stride in zip(range(first, first + rank), windows, steps, strict=True):
        size = parts.shape[axis]
        count = -(-size // stride) if padding == "same" else (size - window) // stride + 1
        if count < 1:
            raise checks.invalid("pool_size", f"at most {size}, the size of the images", pool_size)
        lengths.append((count - 1) * stride + 1)
        missing = max(lengths[-1] + window - 1 - size, 0)
        widths[axis] = (missing // 2, missing - missing // 2)
    # The same in every part: only the winners in the part of `x` are ever read.
    parts = ops.pad(parts, widths, constant_values=-float("inf"))

    def entry(offsets: tuple[int, ...]) -> Tensor:
        cuts = [slice(start, start + n, step) for start, n, step in zip(offsets, lengths, steps, strict=True)]
        return parts[(slice(None),) * first + tuple(cuts)]

    best, *rest = map(entry, itertools.product(*map(range, windows)))
    for challenger in rest:
        best = ops.where(challenger[:1] > best[:1], challenger, best)
    return _join(best)


def _each(size: Any, rank: int) -> tuple[int, ...]:
    return (size,) * rank if checks.is_integer(size) else tuple(size)


def dropout(h: Tensor, rate: float, seed: Seed | None = None, num_probes: int | None = None) -> Tensor:
    """Dropout of `h`, `((P+2)·B, …)`, by one mask `(B, …)`; leave it out, or pass `rate=0`, outside training.

    Other arguments as in `keras.random.dropout`: from the same seed, the mask is that of `dropout(x, …)`.

    Reference: Balestriero & Baraniuk (2021), algorithm 3.
    """
    rate = checks.number("rate", rate, least=0, below=1)
    if seed is not None:
        seed = checks.seed("seed", seed, generator=True)
    parts = _split(h, num_probes)
    return _join(parts * keras.random.dropout(ops.ones_like(parts[0]), rate, seed=seed)) if rate else h


def batch_normalization(
    h: Tensor,
    mean: ArrayLike | None = None,
    variance: ArrayLike | None = None,
    axis: int = -1,
    offset: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    epsilon: float = 1e-3,
    num_probes: int | None = None,
) -> Tensor:
    """Batch normalization of `h`, `((P+2)·B, …)`, by the statistics of `x`, which are frozen: no tangent moves them.

    Other arguments as in `keras.ops.batch_normalization`, but `mean` and `variance`, both `(C,)`: given, they are the
    moving averages; by default they are those of the part of `x`, as in training.

    Reference: Balestriero & Baraniuk (2021), appendix F, which in training differentiates the statistics as well.
    """
    if (mean is None) != (variance is None):
        raise ValueError("Invalid value for argument `mean`. Expected it together with `variance`. Received: one.")
    parts = _split(h, num_probes)
    x, h = parts[0], _join(parts)
    if mean is None:
        mean, variance = ops.moments(x, [a for a in range(len(x.shape)) if a != axis % len(x.shape)])
    return ops.batch_normalization(h, mean, variance, axis, offset=offset, scale=scale, epsilon=epsilon)


def _split(h: Tensor, num_probes: int | None) -> Tensor:
    """((P+2)·B, …) to (P+2, B, …)."""
    h = checks.tensor("h", h)
    if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(h.dtype)):
        h = ops.cast(h, keras.config.floatx())
    num_probes = checks.count("num_probes", num_probes, optional=True)
    count = (1 if num_probes is None else num_probes) + 2
    batch = h.shape[0] if len(h.shape) else 0
    if isinstance(batch, int) and (batch == 0 or batch % count):
        raise ValueError(
            f"Invalid value for argument `h`. Expected a batch of {count}·B examples, as `clone.stack` makes it for "
            f"num_probes={num_probes}. Received: h with shape {tuple(h.shape)}."
        )
    return ops.reshape(h, (count, -1, *ops.shape(h)[1:]))


def _join(parts: Tensor) -> Tensor:
    """(P+2, B, …) to ((P+2)·B, …)."""
    return ops.reshape(parts, (-1, *ops.shape(parts)[2:]))
