"""Fixed points `z = f(z)` of a batch of maps, for each example by itself. Nothing here is differentiated.

A solver proposes the next iterate from `z`, from the gap `f(z) − z`, both `(B, n)`, and from what it remembers. An
example that has converged stays where it is; so does one whose image is not finite, so that it cannot harm the others.
"""

from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from jvpreg.common.typing import Tensor

ANDERSON_WINDOW = 5
BROYDEN_WINDOW = 10
GMRES_WINDOW = 20


class Solution(NamedTuple):
    """The solution, and how good it is.

    Attributes:
        value: the iterate with the smallest residual, `(B, n)`.
        residual: `‖f(z) − z‖ / ‖f(z)‖` there, or divided by `scale` if that was given, `(B,)`; infinite if no image
            was finite.
        iterations: evaluations of f until the example was done, `(B,)`.
        converged: whether the residual is within the tolerance, `(B,)`.
        proposal: the iterate that the solver made of its last evaluation, `(B, n)`, at which f was not evaluated.
    """

    value: Tensor
    residual: Tensor
    iterations: Tensor
    converged: Tensor
    proposal: Tensor


def find_fixed_point(
    function: Callable, start, solver: str, tolerance: float, max_iterations: int, scale=None
) -> Solution:
    """Iterates until all examples are done.

    Args:
        function: f, `(B, n)` to `(B, n)`, one row an example.
        start: the first iterate, `(B, n)`, in float32 at least.
        solver: a key of `SOLVERS`.
        tolerance: of the residual.
        max_iterations: the largest number of evaluations of f.
        scale: the lengths `(B,)` by which residuals are divided; by default `‖f(z)‖`.
    """
    memory, propose = SOLVERS[solver](start)

    def unfinished(i, z, best, least, iterations, active, *memory):
        return ops.logical_and(i < max_iterations, ops.any(active))

    def advance(i, z, best, least, iterations, active, *memory):
        image = function(z)
        gap = image - z
        residual = relative_residual(z, image, scale)
        finite = ops.isfinite(residual)
        better = _all(active, finite, residual < least)
        best, least = ops.where(_column(better), z, best), ops.where(better, residual, least)
        iterations = iterations + ops.cast(active, "int32")
        # An example that converges here still moves to the iterate that follows from this evaluation.
        moves = _column(_all(active, finite))
        active = _all(active, finite, residual > tolerance)
        proposal, memory = propose(i, z, ops.where(moves, gap, 0.0), *memory)
        return i + 1, ops.where(moves, proposal, z), best, least, iterations, active, *memory

    rows = start[:, 0]
    state = (
        ops.convert_to_tensor(0, "int32"),
        start,
        start,
        ops.zeros_like(rows) + np.inf,
        ops.zeros_like(rows, dtype="int32"),
        ops.ones_like(rows, dtype="bool"),
        *memory,
    )
    _, proposal, value, residual, iterations, *_ = ops.while_loop(unfinished, advance, state)
    return Solution(value, residual, iterations, residual <= tolerance, proposal)


def relative_residual(z: Tensor, image: Tensor, scale: Tensor | None = None) -> Tensor:
    """`‖f(z) − z‖ / ‖f(z)‖` of each row of `(B, n)`, or divided by `scale`, `(B,)`."""
    tiny = float(np.finfo(keras.backend.standardize_dtype(z.dtype)).tiny)
    return _norm(image - z) / ((_norm(image) if scale is None else scale) + tiny)


def picard(start):
    """Plain iteration, `z ← f(z)`; it converges for contractions only."""
    return (), lambda i, z, gap: (z + gap, ())


def anderson(start):
    """Anderson acceleration: the gap, minus its least-squares fit by the last changes of the gap.

    Reference: Walker & Ni (2011), "Anderson acceleration for fixed-point iterations", in the form of differences.
    """
    ridge = _root_of_precision(start.dtype) ** 1.5
    eye = ops.expand_dims(ops.eye(ANDERSON_WINDOW, dtype=start.dtype), 0)

    def propose(i, z, gap, z_before, gap_before, moves, changes):
        move, change = _since_last(i, z, gap, z_before, gap_before)
        moves, changes = _remember(moves, move), _remember(changes, change)
        lengths, usable = _lengths(moves, changes)
        # Columns have length 1, so that the ridge is relative to each. A column that is not usable is zero, and so is
        # its coefficient. The matrix is never singular: TensorFlow would fail for the whole batch.
        units = ops.where(usable, changes / lengths, 0.0)
        gram = ops.matmul(units, ops.transpose(units, (0, 2, 1))) + ridge * eye
        coefficients = ops.solve(gram, ops.matmul(units, ops.expand_dims(gap, -1)))
        steps = ops.where(usable, (moves + changes) / lengths, 0.0)
        return z + gap - _combine(coefficients, steps), (z, gap, moves, changes)

    window = _empty(start, ANDERSON_WINDOW)
    return (start, ops.zeros_like(start), window, window), propose


def broyden(start):
    """Broyden's good method: the inverse Jacobian of the gap is `−I` plus updates of rank one, restarted when full.

    Reference: Broyden (1965), "A class of methods for solving nonlinear simultaneous equations".
    """

    def propose(i, z, gap, z_before, gap_before, lefts, rights):
        # Updates since the last restart.
        count = i % (BROYDEN_WINDOW + 1)

        def inverse(vector, count):
            return _combine(_last(count, _products(rights, vector)), lefts) - vector

        move, change = _since_last(i, z, gap, z_before, gap_before)
        solved = inverse(change, count - 1)
        right = _combine(_last(count - 1, _products(lefts, move)), rights) - move
        denominator = ops.sum(right * change, axis=-1, keepdims=True)
        size = ops.sum(ops.square(move), axis=-1, keepdims=True)
        usable = ops.abs(denominator) > _root_of_precision(z.dtype) * size
        left = ops.where(usable, (move - solved) / ops.where(usable, denominator, 1.0), 0.0)
        lefts, rights = _remember(lefts, left), _remember(rights, ops.where(usable, right, 0.0))
        return z - inverse(gap, count), (z, gap, lefts, rights)

    window = _empty(start, BROYDEN_WINDOW)
    return (start, ops.zeros_like(start), window, window), propose


def gmres(start):
    """Restarted GMRES, for an affine f: the smallest gap over the space of all steps since the last restart.

    An iterate costs one product, since the change of the gap by a step is the step's image. The images are kept
    orthonormal, and each step with its image. The next step is the gap that is left, or the last image if the gap has
    not become smaller: then the space still grows, while with the gap alone the method would stop.

    Reference: Saad & Schultz (1986), in the form of Jiránek & Rozložník (2010), "Adaptive version of simpler GMRES".
    """

    def propose(i, z, gap, z_before, gap_before, length_before, moves, images):
        # Steps since the restart; older ones in the windows are masked, since copying the windows is expensive.
        count = i % GMRES_WINDOW
        move, image = _since_last(i, z, gap, z_before, gap_before)
        whole = _norm(move)
        for _ in range(2):  # Twice is enough (Kahan, Parlett).
            products = _last(count - 1, _products(images, image))
            move, image = move - _combine(products, moves), image - _combine(products, images)
        length = _norm(image)
        usable = length > _root_of_precision(z.dtype) * ops.maximum(_norm(move), 1e-3 * whole)
        usable = ops.logical_and(usable, count > 0)
        length, usable = _column(ops.where(usable, length, 1.0)), _column(usable)
        image = ops.where(usable, image / length, 0.0)
        moves = _remember(moves, ops.where(usable, move / length, 0.0))
        images = _remember(images, image)
        products = _last(count, _products(images, gap))
        z_least, left = z - _combine(products, moves), gap - _combine(products, images)
        length = _norm(left)
        stalls = _all(length > 0.9 * length_before, usable[:, 0])
        step = ops.where(_column(stalls), _column(length) * image, left)
        full = ops.equal(count, GMRES_WINDOW - 1)
        return z_least + ops.where(full, 0.0, step), (z, gap, length, moves, images)

    window = _empty(start, GMRES_WINDOW)
    zero = ops.zeros_like(start)
    return (start, zero, zero[:, 0] + np.inf, window, window), propose


SOLVERS: dict[str, Callable] = {"anderson": anderson, "broyden": broyden, "gmres": gmres, "picard": picard}

NONLINEAR = tuple(name for name in SOLVERS if name != "gmres")


def _since_last(i, z, gap, z_before, gap_before) -> tuple:
    """The last step and the change of the gap; zero before the first step."""
    return ops.where(i > 0, z - z_before, 0.0), ops.where(i > 0, gap - gap_before, 0.0)


def _lengths(moves, changes) -> tuple:
    """The lengths of the changes, `(B, m, 1)`; 1 for a change that is not usable because it is only rounding."""
    lengths = ops.norm(changes, axis=-1, keepdims=True)
    usable = lengths > _root_of_precision(moves.dtype) * ops.norm(moves, axis=-1, keepdims=True)
    return ops.where(usable, lengths, 1.0), usable


def _remember(window, row):
    """A window `(B, m, n)` without its first row, and with `row` (B, n) as its last."""
    return ops.concatenate([window[:, 1:], ops.expand_dims(row, 1)], axis=1)


def _products(rows, vector):
    """The inner products of rows `(B, m, n)` with a vector `(B, n)`: `(B, m, 1)`."""
    return ops.matmul(rows, ops.expand_dims(vector, -1))


def _combine(coefficients, rows):
    """The sum `(B, n)` of rows `(B, m, n)` with coefficients `(B, m, 1)`."""
    return ops.matmul(ops.transpose(coefficients, (0, 2, 1)), rows)[:, 0]


def _last(count, coefficients):
    """Coefficients `(B, m, 1)`, all zero except the last `count`."""
    size = coefficients.shape[1]
    kept = ops.reshape(ops.arange(size, dtype="int32") >= size - count, (1, size, 1))
    return ops.where(kept, coefficients, 0.0)


def _empty(start, size: int):
    return ops.repeat(ops.expand_dims(ops.zeros_like(start), 1), size, axis=1)


def _norm(rows):
    return ops.norm(rows, axis=-1)


def _column(vector):
    return ops.expand_dims(vector, -1)


def _all(*conditions):
    first, *others = conditions
    for other in others:
        first = ops.logical_and(first, other)
    return first


def _root_of_precision(dtype) -> float:
    return float(np.finfo(keras.backend.standardize_dtype(dtype)).eps) ** 0.5
