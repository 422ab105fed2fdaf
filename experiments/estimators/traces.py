"""Hutchinson, Hutch++ and XTrace at equal numbers of products."""

from typing import Any, Literal, get_args

import numpy as np
from keras import ops

from jvpreg.estimators import Operator, trace

Method = Literal["hutchinson", "hutch++", "xtrace"]


def errors(matrix: np.ndarray, matvecs: list[int], num_seeds: int, seed: int) -> dict[str, Any]:
    """Errors of the trace of one square matrix, from many independent draws.

    Args:
        matrix: `(n, n)`.
        matvecs: numbers of products.
        num_seeds: independent estimates.
        seed: of the draws.

    Returns:
        `trace`, `frobenius_norm` and, by method, rows of: the products spent, the root mean square error, also relative
        to the trace; the mean error and its standard error; and the reported standard error (root mean square) in
        units of the actual spread.
    """
    exact = float(np.trace(np.float64(matrix)))
    tensor = ops.convert_to_tensor(matrix.T, "float32")
    n = len(matrix)
    # An example of the batch for each draw, all of the same matrix.
    operator = Operator(lambda v: ops.matmul(v, tensor), None, (n, n), num_seeds, "float32", chunk_size=n)
    methods: dict[str, list[dict[str, float]]] = {}
    for method in get_args(Method):
        methods[method] = []
        for count in matvecs:
            estimate = trace(operator, count, method, seed)
            value, sem = (np.float64(ops.convert_to_numpy(part)) for part in estimate[:2])
            off = value - exact
            methods[method].append(
                {
                    "matvecs": estimate.num_matvecs,
                    "error": float(np.sqrt(np.mean(off**2))),
                    "relative_error": float(np.sqrt(np.mean(off**2)) / abs(exact)),
                    "bias": float(np.mean(off)),
                    "bias_sem": float(np.std(value, ddof=1) / np.sqrt(num_seeds)),
                    "sem_over_spread": float(np.sqrt(np.mean(sem**2)) / np.std(value, ddof=1)),
                }
            )
    return {"trace": exact, "frobenius_norm": float(np.linalg.norm(matrix)), "methods": methods}
