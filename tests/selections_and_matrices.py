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
    "median": lambda x: ops.median(x, axis=(1, 2)),
    "median-flat": ops.median,
    "quantile": lambda x: ops.quantile(x, 0.3, axis=1, keepdims=True),
    "quantiles": lambda x: ops.quantile(x, [0.1, 0.5, 0.75], axis=2),
    "percentile": lambda x: ops.percentile(x, 40, axis=1, method="midpoint"),
    "max-pool": lambda x: ops.max_pool(x, 2, data_format="channels_last"),
    "max-pool-overlapping": lambda x: ops.max_pool(x, (3,), 1, "same", data_format="channels_last"),
    "adaptive-max-pool": lambda x: ops.adaptive_max_pool(x, (2,), data_format="channels_last"),
    "sparsemax": ops.sparsemax,
    "hard-shrink": ops.hard_shrink,
    "soft-shrink": ops.soft_shrink,
    "threshold": lambda x: ops.threshold(x, 0.2, -1.0),
    "sparse-plus": ops.sparse_plus,
    "sparse-sigmoid": ops.sparse_sigmoid,
}
MATRICES = {
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
    "erfinv": lambda x: ops.erfinv(0.9 * ops.tanh(x)),
    "batch-normalization": normalized,
}
# The orders of norms that no other row has, with the axes.
NORMS = {
    "1": (1, 1),
    "3": (3, 1),
    "half": (0.5, 1),
    "below-zero": (-1.5, 1),
    "largest": (float("inf"), 2),
    "smallest": (float("-inf"), 2),
    "columns": (1, (1, 2)),
    "least-column": (-1, (1, 2)),
    "rows": (float("inf"), (1, 2)),
    "least-row": (float("-inf"), (2, 1)),
    "spectral": (2, (1, 2)),
    "least-singular": (-2, (1, 2)),
    "nuclear": ("nuc", (1, 2)),
}
# The rows that are checked compiled too: one of each family.
COMPILED = {"top-k", "quantile", "max-pool", "inv", "solve", "svd", "batch-normalization"}
