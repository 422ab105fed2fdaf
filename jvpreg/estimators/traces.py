"""The trace of a square Jacobian by random vectors."""

import math
from typing import Literal

from keras import ops

from jvpreg.common import checks
from jvpreg.common.typing import Seed, Tensor
from jvpreg.estimators.krylov import probed, without
from jvpreg.estimators.norms import mean_and_sem
from jvpreg.estimators.nystrom import xnystrace
from jvpreg.estimators.operator import Operator, as_operator, by_example, check_square, magnitude
from jvpreg.estimators.result import Estimate, exact
from jvpreg.linearization import Linearization

METHODS = {"hutchinson": 2, "hutch++": 6, "xtrace": 4, "xnystrace": 2}
"""The methods, and the smallest number of products with which each has a standard error."""


@by_example
def trace(
    linearization: Linearization | Operator,
    num_matvecs: int = 32,
    method: Literal["hutchinson", "hutch++", "xtrace", "xnystrace"] = "xtrace",
    seed: Seed = 0,
) -> Estimate:
    """`tr J` of each example: the divergence of a vector field.

    Hutchinson's estimate averages `uᵀ J u`. Hutch++ spends a third of its products on a subspace that holds the
    largest part of `J`; the trace of this part is exact, and only that of the rest is estimated. XTrace does the same
    with each vector left out in turn. If the spectrum decays, both need far fewer products; if it is flat, a few more.
    XNysTrace is for symmetric positive semidefinite `J` only, which is not checked, and needs half of XTrace's.

    Args:
        linearization: from `jvpreg.linearize`, or an `Operator`.
        num_matvecs: products `J u` for each example. If there are at least as many as dimensions, the trace is exact.
        method: `"hutchinson"`, `"hutch++"`, `"xtrace"` or `"xnystrace"`.
        seed: an integer or a `keras.random.SeedGenerator`.

    Returns:
        An `Estimate`, each part `(B,)`, unbiased. `num_matvecs` is what was computed: a multiple of 3 for Hutch++ and
        of 2 for XTrace. The estimates that XTrace and XNysTrace average share their products, so their `sem` is too
        small if the spectrum decays: about 0.7 and 0.4 of the spread.

    Raises:
        ValueError: an argument is out of its range, or `J` is not square.

    Reference: Hutchinson (1989); Meyer, Musco, Musco & Woodruff (2021), "Hutch++"; Epperly, Tropp & Webber (2024),
    "XTrace".

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, kernel_initializer="identity")])
    >>> estimate = jvpreg.estimators.trace(jvpreg.linearize(model, np.zeros((1, 3))))
    >>> round(float(keras.ops.convert_to_numpy(estimate.value)[0]), 4)
    3.0
    """
    checks.choice("method", method, METHODS)
    checks.seed("seed", seed, generator=True)
    operator = as_operator(linearization)
    check_square(operator, "trace")
    checks.count("num_matvecs", num_matvecs)
    size = operator.shape[0]
    if num_matvecs >= size:
        return exact(ops.einsum("pbp->b", operator.matvec(operator.basis())), size)
    checks.count("num_matvecs", num_matvecs, least=METHODS[method])
    estimates = {
        "hutchinson": _hutchinson,
        "hutch++": _hutch_plus_plus,
        "xtrace": _xtrace,
        "xnystrace": _xnystrace,
    }
    samples, spent, unit = estimates[method](operator, num_matvecs, seed)
    value, sem = (unit * part for part in mean_and_sem(ops.transpose(samples)))
    return Estimate(value, sem, ops.zeros_like(value), None, spent)


def _hutchinson(operator: Operator, num_matvecs: int, seed: Seed) -> tuple:
    """Estimates `(B, m)`, the number of products, and the unit `(B,)` in which the estimates are."""
    rows = ops.transpose(operator.draw("rademacher", num_matvecs, seed), (1, 0, 2))
    images, unit = _in_units(probed(operator.matvec)(rows))
    return ops.sum(rows * images, axis=-1), num_matvecs, unit


def _hutch_plus_plus(operator: Operator, num_matvecs: int, seed: Seed) -> tuple:
    count = num_matvecs // 3
    matvec = probed(operator.matvec)
    drawn = ops.transpose(operator.draw("rademacher", 2 * count, seed), (1, 0, 2))
    images, unit = _in_units(matvec(drawn[:, :count]))
    basis = _basis_of(images)[0]
    matvec = probed(operator.over(unit).matvec)
    known = ops.sum(basis * matvec(basis), axis=(1, 2))
    rest = without(drawn[:, count:], basis)
    return ops.expand_dims(known, -1) + ops.sum(rest * matvec(rest), axis=-1), 3 * count, unit


def _xtrace(operator: Operator, num_matvecs: int, seed: Seed) -> tuple:
    """Estimates `(B, m)`: each uses the space of all vectors but one, and that one for the rest.

    With `A Ω = Q R`, the space of all images but the i-th is that of `Q` without one unit vector `s_i`, which is
    orthogonal to the other columns of `R`: a normalized column of `R⁻ᵀ`. So each estimate costs only small products.
    """
    count, size = num_matvecs // 2, operator.shape[0]
    omega = ops.transpose(operator.draw("sphere", count, seed), (1, 0, 2))
    images, unit = _in_units(probed(operator.matvec)(omega))
    q, r = _basis_of(images)
    z = probed(operator.over(unit).matvec)(q)
    transposed = ops.transpose(q, (0, 2, 1))
    # Columns from here on: H = Qᵀ A Q, W = Qᵀ Ω, T = (A Q)ᵀ Ω, each (B, m, m).
    h = ops.matmul(q, ops.transpose(z, (0, 2, 1)))
    w = ops.transpose(ops.matmul(omega, transposed), (0, 2, 1))
    t = ops.matmul(z, ops.transpose(omega, (0, 2, 1)))
    s = ops.transpose(_inverse(r), (0, 2, 1))
    s = s / ops.norm(s, axis=1, keepdims=True)

    def dots(a: Tensor, b: Tensor) -> Tensor:
        return ops.sum(a * b, axis=1)

    ws = dots(w, s)
    x = w - s * ops.expand_dims(ws, 1)  # the vector within its own space
    # The part of ω outside of this space is stretched to its average length.
    left = ops.maximum(size - dots(x, x), 1e-6 * size)
    stretch = (size - count + 1) / left
    rest = ws * dots(s, r) - dots(t, x) + dots(x, ops.matmul(h, x))
    known = ops.expand_dims(ops.trace(h, axis1=1, axis2=2), -1) - dots(s, ops.matmul(h, s))
    return known + stretch * rest, 2 * count, unit


def _xnystrace(operator: Operator, num_matvecs: int, seed: Seed) -> tuple:
    omega = ops.transpose(operator.draw("sphere", num_matvecs, seed), (1, 0, 2))
    images, unit = _in_units(probed(operator.matvec)(omega))
    return xnystrace(omega, images), num_matvecs, unit


def _in_units(rows: Tensor) -> tuple:
    """Images `(B, m, n)` divided by the largest entry of each example, and that entry, `(B,)`."""
    unit = magnitude(ops.transpose(rows, (1, 0, 2)))
    return rows / ops.reshape(unit, (-1, 1, 1)), unit


def _basis_of(rows: Tensor) -> tuple:
    """Orthonormal rows `(B, m, n)` that span the same space, and the triangle R `(B, m, m)` of the QR."""
    columns, triangle = ops.qr(ops.transpose(rows, (0, 2, 1)))
    return ops.transpose(columns, (0, 2, 1)), triangle


def _inverse(triangle: Tensor) -> Tensor:
    """The inverse of an upper triangle. If it is singular (the rank is used up), that of a triangle close to it."""
    size = triangle.shape[-1]
    diagonal = ops.diagonal(triangle, axis1=1, axis2=2)
    largest = ops.max(ops.abs(diagonal), axis=-1, keepdims=True)
    floor = ops.where(largest > 0, largest, 1.0) * math.ulp(1.0)
    lifted = ops.where(ops.abs(diagonal) > floor, diagonal, floor)
    identity = ops.eye(size, dtype=triangle.dtype)
    triangle = triangle + ops.expand_dims(lifted - diagonal, -1) * identity
    return ops.solve_triangular(triangle, ops.broadcast_to(identity, ops.shape(triangle)), lower=False)
