"""The linear algebra of `keras.ops`: inverses, determinants, factors and solutions of linear systems.

Each pushforward is the textbook one: M. Giles (2008), "Collected matrix derivative results for forward and reverse mode
algorithmic differentiation", section 2 and 3, unless a rule names another source. In the comments, `A` is the operand,
and `dA` its tangent.

Eigenvectors and singular vectors have no derivative where their values are equal. There they count as fixed among
themselves, as on TensorFlow (autodiff on JAX and Torch has NaN): the slopes of sums of the values are right.
"""

import keras
from keras import ops

from jvpreg.common.dtypes import is_complex
from jvpreg.common.keras_private import linalg, math_ops, numpy_ops
from jvpreg.rules.contract import Declined, Pushforward
from jvpreg.rules.examples import MIXED, along, kept
from jvpreg.rules.families import each_input
from jvpreg.rules.folding import each_probe
from jvpreg.rules.registry import register_rule


def transposed(matrix):
    return ops.swapaxes(matrix, -1, -2)


def _symmetric(matrix):
    """The symmetric part: factors of symmetric matrices are functions of such matrices alone."""
    return 0.5 * (matrix + transposed(matrix))


def _trace(matrix):
    return ops.sum(ops.diagonal(matrix, axis1=-2, axis2=-1), axis=-1)


def _diagonal(vector):
    """The matrix with this diagonal."""
    return ops.expand_dims(vector, -1) * ops.eye(vector.shape[-1], dtype=vector.dtype)


def _reciprocal(x):
    """`1 / x`, and 0 where x is 0."""
    return ops.where(x == 0, 0.0, 1 / ops.where(x == 0, ops.ones_like(x), x))


def _gaps(values):
    """`1 / (λⱼ − λᵢ)` at (i, j), and 0 where both are equal."""
    return _reciprocal(ops.expand_dims(values, -2) - ops.expand_dims(values, -1))


def _inverse_of_triangle(factor, lower: bool):
    identity = ops.broadcast_to(ops.eye(factor.shape[-1], dtype=factor.dtype), ops.shape(factor))
    return ops.solve_triangular(factor, identity, lower=lower)


def _decline_complex(*operands) -> None:
    if any(map(is_complex, operands)):
        raise Declined("a matrix of complex numbers")


# ---------------------------------------------------------------- inverses and determinants


@register_rule(linalg.Inv)
def inverse(operation, x, context):
    _decline_complex(x)
    y = operation.call(x)

    def push(tangent, y):  # Giles 2.2.3: dC = −C dA C
        return -ops.matmul(y, ops.matmul(tangent, y))

    return y, Pushforward(push, y, examples=along(operation, x.shape))


def _regular(x, singular):
    """x, and near it a matrix that has an inverse where x is `singular` (…)."""
    largest = ops.max(ops.abs(x), axis=(-2, -1), keepdims=True)
    step = 1e-8 if keras.backend.standardize_dtype(x.dtype) == "float64" else 1e-4
    size = ops.stop_gradient(step * ops.where(largest > 0, largest, ops.ones_like(largest)))
    return x + ops.where(singular[..., None, None], size, ops.zeros_like(size)) * ops.eye(x.shape[-1], dtype=x.dtype)


@register_rule(linalg.Det)
def determinant(operation, x, context):
    _decline_complex(x)
    y = operation.call(x)
    # Not by the inverse of A itself: a determinant has a derivative where A is singular too.
    near = _regular(x, ops.equal(y, 0))
    adjugate = operation.call(near)[..., None, None] * ops.inv(near)

    def push(tangent, adjugate):  # Giles 2.2.4: dC = C tr(A⁻¹ dA)
        return ops.sum(transposed(adjugate) * tangent, axis=(-2, -1))

    return y, Pushforward(push, adjugate, examples=along(operation, x.shape))


@register_rule(numpy_ops.Slogdet, math_ops.Logdet)
def log_determinant(operation, x, context):
    """At a singular matrix, where the logarithm is −∞, its slope is a large number, as that of `log` at 0."""
    _decline_complex(x)
    y = operation.call(x)
    with_sign = isinstance(operation, numpy_ops.Slogdet)
    inverse = ops.inv(_regular(x, ops.logical_not(ops.isfinite(y[1] if with_sign else y))))

    def push(tangent, inverse):  # Giles 2.2.4
        image = ops.sum(transposed(inverse) * tangent, axis=(-2, -1))
        return (ops.zeros_like(image), image) if with_sign else image

    return y, Pushforward(push, inverse, examples=along(operation, x.shape), finite=False)


@register_rule(linalg.Pinv)
def pseudoinverse(operation, x, context):
    _decline_complex(x)
    y = operation.call(x)

    def push(tangent, x, y):
        # Golub & Pereyra (1973), "The differentiation of pseudo-inverses", eq. 4.12, while the rank stays as it is.
        turned = transposed(tangent)
        image = -ops.matmul(y, ops.matmul(tangent, y))
        # y yᵀ dAᵀ (1 − A y)
        left = ops.matmul(ops.matmul(y, transposed(y)), turned)
        image += left - ops.matmul(ops.matmul(left, x), y)
        # (1 − y A) dAᵀ yᵀ y
        right = ops.matmul(turned, ops.matmul(transposed(y), y))
        return image + right - ops.matmul(y, ops.matmul(x, right))

    return y, Pushforward(push, x, y, examples=along(operation, x.shape))


# ---------------------------------------------------------------- linear systems


def _by_columns(solve, tangent, vector: bool):
    """`solve` of right-hand sides (P, …, n, k), or vectors (P, …, n): all probes are columns of one system."""
    columns = ops.moveaxis(tangent[..., None] if vector else tangent, 0, -2)
    shape = ops.shape(columns)
    solved = solve(ops.reshape(columns, (*shape[:-2], -1)))
    solved = ops.moveaxis(ops.reshape(solved, (*shape[:-3], -1, *shape[-2:])), -2, 0)
    return ops.squeeze(solved, -1) if vector else solved


@register_rule(linalg.Solve, linalg.SolveTriangular)
def solution(operation, a, b, context):
    _decline_complex(a, b)
    vector = len(b.shape) == len(a.shape) - 1
    if tuple(a.shape[:-2]) != tuple(b.shape[: len(a.shape) - 2]):
        raise Declined("matrices and right-hand sides of unlike batches")
    y = operation.call(a, b)
    triangular = isinstance(operation, linalg.SolveTriangular)

    def read(matrix):
        """What the operation reads of a matrix."""
        return (ops.tril if operation.lower else ops.triu)(matrix) if triangular else matrix

    def solve(a, right):
        return _by_columns(lambda columns: operation.call(a[0], columns), right, vector)

    def by_matrix(tangent, a, y):  # Giles 2.3.1: dC = A⁻¹ (dB − dA C)
        columns = y[..., None] if vector else y
        moved = ops.matmul(read(tangent), columns)
        return solve(a, -(ops.squeeze(moved, -1) if vector else moved))

    def by_right_side(tangent, a, y):
        return solve(a, tangent)

    def after(*places):
        place = kept(*places)
        return place if place.axis < len(a.shape) - 2 else MIXED

    return y, Pushforward(each_input(by_matrix, by_right_side), a, y, takes_none=True, examples=after)


@register_rule(linalg.Lstsq)
def least_squares(operation, a, b, context):
    _decline_complex(a, b)
    # Not by the operation itself: two decompositions side by side can wait for each other on JAX.
    inverse = ops.pinv(a, rcond=operation.rcond)
    y = ops.matmul(inverse, b)
    vector = len(b.shape) == 1

    def of_matrix(da, a, b, inverse):
        # C = A⁺ B, by the same equation as the pseudoinverse.
        columns = b[:, None] if vector else b
        c = ops.matmul(inverse, columns)
        turned = ops.matmul(transposed(da), columns - ops.matmul(a, c))
        image = ops.matmul(inverse, ops.matmul(transposed(inverse), turned) - ops.matmul(da, c))
        other = ops.matmul(transposed(da), ops.matmul(transposed(inverse), c))
        image += other - ops.matmul(inverse, ops.matmul(a, other))
        return image[:, 0] if vector else image

    def by_matrix(tangent, a, b, inverse):
        return each_probe(lambda da: of_matrix(da, a[0], b[0], inverse[0]))(tangent)

    def by_right_side(tangent, a, b, inverse):
        return each_probe(lambda db: ops.matmul(inverse[0], db))(tangent)

    push = each_input(by_matrix, by_right_side)
    return y, Pushforward(push, a, b, inverse, takes_none=True, examples=lambda *places: MIXED)


# ---------------------------------------------------------------- factors


@register_rule(linalg.Cholesky)
def cholesky(operation, x, context):
    _decline_complex(x)
    y = operation.call(x)
    factor = transposed(y) if operation.upper else y
    inverse = _inverse_of_triangle(factor, lower=True)

    def push(tangent, factor, inverse):
        # dL = L Φ(L⁻¹ dA L⁻ᵀ), where Φ takes the lower triangle with half of the diagonal: I. Murray (2016),
        # "Differentiation of the Cholesky decomposition", eq. 8.
        inner = ops.matmul(ops.matmul(inverse, _symmetric(tangent)), transposed(inverse))
        half = ops.tril(inner) - 0.5 * _diagonal(ops.diagonal(inner, axis1=-2, axis2=-1))
        image = ops.matmul(factor, half)
        return transposed(image) if operation.upper else image

    return y, Pushforward(push, factor, inverse, examples=along(operation, x.shape), finite=False)


@register_rule(linalg.CholeskyInverse)
def inverse_by_cholesky(operation, x, context):
    """`(L Lᵀ)⁻¹` of a lower triangle L, or `(Uᵀ U)⁻¹` of an upper one."""
    _decline_complex(x)
    y = operation.call(x)
    triangle = ops.triu if operation.upper else ops.tril

    def push(tangent, x, y):
        factor, moved = triangle(x), triangle(tangent)
        if operation.upper:
            factor, moved = transposed(factor), transposed(moved)
        product = ops.matmul(moved, transposed(factor))
        return -ops.matmul(y, ops.matmul(product + transposed(product), y))

    def second(u, w, inputs):
        # Stated, since Torch's own forward mode is wrong here. With Y = A⁻¹: Y (A_u Y A_w + A_w Y A_u − A_uw) Y.
        factor, u, w = triangle(inputs[0]), triangle(u[0]), triangle(w[0])
        if operation.upper:
            factor, u, w = transposed(factor), transposed(u), transposed(w)
        along_u, along_w, both = (ops.matmul(a, transposed(b)) for a, b in ((u, factor), (w, factor), (u, w)))
        along_u, along_w, both = (product + transposed(product) for product in (along_u, along_w, both))
        crossed = ops.matmul(along_u, ops.matmul(y, along_w))
        return ops.matmul(y, ops.matmul(crossed + transposed(crossed) - both, y))

    return y, Pushforward(push, x, y, second=second, examples=along(operation, x.shape))


@register_rule(linalg.Eigh)
def eigenvalues_of_symmetric(operation, x, context):
    _decline_complex(x)
    values, vectors = operation.call(x)

    def push(tangent, vectors, gaps):  # Giles 3.1
        inner = ops.matmul(transposed(vectors), ops.matmul(_symmetric(tangent), vectors))
        return ops.diagonal(inner, axis1=-2, axis2=-1), ops.matmul(vectors, gaps * inner)

    return (values, vectors), Pushforward(push, vectors, _gaps(values), examples=along(operation, x.shape))


@register_rule(linalg.Eig)
def eigenvalues(operation, x, context):
    raise Declined("its eigenvalues are complex")


@register_rule(linalg.SVD)
def singular_values(operation, x, context):
    _decline_complex(x)
    if not operation.compute_uv:
        u, s, vh = ops.svd(x, full_matrices=False)

        def push_values(tangent, u, vh):  # Giles 3.2: dσᵢ = uᵢᵀ dA vᵢ
            return ops.sum(u * ops.matmul(tangent, transposed(vh)), axis=-2)

        return s, Pushforward(push_values, u, vh, examples=along(operation, x.shape))
    u, s, vh = operation.call(x)
    size = s.shape[-1]

    def push(tangent, u, s, vh):
        # J. Townsend (2016), "Differentiating the singular value decomposition". U and V turn by dU = U Ω, with
        # Ω = −Ωᵀ; the vectors beside the singular ones, which nothing fixes, do not turn among themselves.
        inner = ops.matmul(transposed(u), ops.matmul(tangent, transposed(vh)))
        square = inner[..., :size, :size]
        row, inverse = ops.expand_dims(s, -2), _reciprocal(ops.expand_dims(s, -2))
        gaps = _gaps(ops.square(s))
        left = gaps * (square * row + transposed(square * row))
        right = gaps * (row[..., 0, :, None] * square + transposed(square) * row)
        du, dvh = ops.matmul(u[..., :size], left), -ops.matmul(right, vh[..., :size, :])
        moved_u = ops.matmul(tangent, transposed(vh[..., :size, :])) * inverse
        moved_v = ops.matmul(transposed(tangent), u[..., :size]) * inverse
        moved_u = moved_u - ops.matmul(u[..., :size], ops.matmul(transposed(u[..., :size]), moved_u))
        moved_v = moved_v - ops.matmul(transposed(vh[..., :size, :]), ops.matmul(vh[..., :size, :], moved_v))
        du, dvh = du + moved_u, dvh + transposed(moved_v)
        if u.shape[-1] > size:
            others = -ops.matmul(u[..., :size], ops.matmul(transposed(moved_u), u[..., size:]))
            du = ops.concatenate([du, others], axis=-1)
        if vh.shape[-2] > size:
            others = -ops.matmul(ops.matmul(vh[..., size:, :], moved_v), vh[..., :size, :])
            dvh = ops.concatenate([dvh, others], axis=-2)
        return du, ops.diagonal(square, axis1=-2, axis2=-1), dvh

    return (u, s, vh), Pushforward(push, u, s, vh, examples=along(operation, x.shape))


@register_rule(linalg.Qr)
def qr(operation, x, context):
    _decline_complex(x)
    rows, columns = x.shape[-2:]
    if operation.mode == "complete" and rows > columns:
        raise Declined("a complete basis, which nothing fixes beside the columns of the matrix")
    q, r = operation.call(x)
    size = min(rows, columns)
    inverse = _inverse_of_triangle(r[..., :size], lower=False)

    def push(tangent, x, q, r, inverse):
        # S. Walter & L. Lehmann (2010), "Algorithmic differentiation of linear algebra functions": the lower triangle
        # of B = Qᵀ dA R⁻¹ is that of Qᵀ dQ, which is antisymmetric. Of a wide matrix, the first columns tell Q.
        moved = ops.matmul(tangent[..., :size], inverse)
        inner = ops.matmul(transposed(q), moved)
        lower = ops.tril(inner, -1)
        upper = inner - lower + transposed(lower)
        dq = moved - ops.matmul(q, upper)
        dr = ops.matmul(upper, r[..., :size])
        if columns > size:
            others = ops.matmul(transposed(dq), x[..., size:]) + ops.matmul(transposed(q), tangent[..., size:])
            dr = ops.concatenate([dr, others], axis=-1)
        return dq, dr

    return (q, r), Pushforward(push, x, q, r, inverse, examples=along(operation, x.shape), finite=False)
