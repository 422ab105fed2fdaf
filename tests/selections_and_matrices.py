"""Rows of the table of cases: operations that select entries, and linear algebra."""

from keras import ops


def definite(x):
    """A symmetric matrix (3, 3) whose eigenvalues are positive and apart."""
    return ops.matmul(ops.transpose(x, (0, 2, 1)), x) + ops.diag(ops.cast([1, 2, 4], x.dtype))


def regular(x):
    return x[:, :3] + 3 * ops.eye(3, dtype=x.dtype)


def normalized(x):
    mean, variance = ops.moments(x, axes=[0, 2])
    scale, offset = ops.exp(mean), ops.tanh(variance)
    return ops.batch_normalization(x, mean, variance, axis=1, offset=offset, scale=scale)


# Name: a function of a tensor (4, 3), or of two. The last operation is the tested one.
SELECTIONS = {
    "top-k": lambda x: ops.top_k(x, 2)[0],
    "sort": lambda x: ops.sort(x, axis=1),
    "sort-flat": lambda x: ops.sort(x, axis=None),
    "gather-by-top-k": lambda x: ops.take_along_axis(x, ops.top_k(x, 2)[1], axis=-1),
    "gather-by-argsort": lambda x: ops.take_along_axis(x, ops.argsort(x, axis=1), axis=1),
    "median-flat": ops.median,
    "max-pool": lambda x: ops.max_pool(x, (2,), 2, data_format="channels_last"),
    "max-pool-overlapping": lambda x: ops.max_pool(x, (3,), 1, "same", data_format="channels_last"),
    "adaptive-max-pool": lambda x: ops.adaptive_max_pool(x, (2,), data_format="channels_last"),
    "sparsemax": ops.sparsemax,
}
MATRICES_AND_LOSSES = {
    "inv": lambda x: ops.inv(regular(x)),
    "det": lambda x: ops.det(x[:, :3]),
    "slogdet": lambda x: ops.slogdet(regular(x))[1],
    "logdet": lambda x: ops.logdet(definite(x)),
    "pinv": ops.pinv,
    "solve": lambda x: ops.solve(regular(x), ops.tanh(x[:, 1:])),
    "solve-triangular": lambda x: ops.solve_triangular(regular(x), x[:, 1:], lower=True),
    "lstsq": lambda x: ops.lstsq(x[0], ops.sin(x[1])),
    "cholesky": lambda x: ops.cholesky(definite(x)),
    "cholesky-upper": lambda x: ops.cholesky(definite(x), upper=True),
    "cholesky-inverse": lambda x: ops.cholesky_inverse(ops.tril(regular(x)[0])),
    "eigh": lambda x: ops.eigh(definite(x)),
    "svd": lambda x: ops.svd(x, full_matrices=False),
    "svd-square": lambda x: ops.svd(x[:, :3]),
    "svd-values": lambda x: ops.svd(x, compute_uv=False),
    "qr": lambda x: ops.qr(x),
    "qr-wide": lambda x: ops.qr(x[:, :2]),
    "batch-normalization": normalized,
    "sparse-categorical-crossentropy-of-probabilities": lambda x: ops.sparse_categorical_crossentropy(
        ops.argmax(x, axis=-1), ops.softmax(x)
    ),
    "categorical-crossentropy-of-logits": lambda x: ops.categorical_crossentropy(
        ops.softmax(x, axis=1), 2 * x, True, 1
    ),
}
INF = float("inf")


def norms(*orders, axis):
    """Norms of several orders, as (B, n)."""
    return lambda x: ops.concatenate([ops.norm(x, order, axis, keepdims=True) for order in orders], axis=1)


# Operations that a functional model of Keras does not run with an axis on JAX: within a layer's call. With the one to
# whose row this adds, and the function.
WITHIN_A_CALL = {
    "norm-root": (ops.norm, lambda x: ops.norm(x, axis=1)),
    "norm-frobenius": (ops.norm, lambda x: ops.norm(x, axis=(1, 2), keepdims=True)),
    "norms-of-vectors": (ops.norm, norms(1, 3, 0.5, -1.5, INF, -INF, axis=1)),
    "norms-of-matrices": (ops.norm, norms(1, -1, INF, -INF, axis=(2, 1))),
    "norms-of-spectra": (ops.norm, norms(2, -2, "nuc", axis=(1, 2))),
    "median": (ops.median, lambda x: ops.median(x, axis=(1, 2))),
    "quantile": (ops.quantile, lambda x: ops.quantile(x, [0.1, 0.5, 0.75], axis=2, keepdims=True)),
    "percentile": (ops.percentile, lambda x: ops.percentile(x, 40, axis=1, method="midpoint")),
}
# What the operation of a function above needs besides a tensor.
NEEDED = {ops.quantile: (0.5,), ops.percentile: (50,)}
# The rows that are checked compiled too, and on JAX: one of each family.
COMPILED = {"top-k", "norm-root", "norm-frobenius", "quantile", "inv", "cholesky", "batch-normalization"}
