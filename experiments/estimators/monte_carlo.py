"""Estimates from random probes: of ‖J‖_F probe by probe, and of the trace, by three methods at equal cost."""

from typing import Any, Literal, get_args

import numpy as np
from keras import ops

import jvpreg
from jvpreg import Linearization
from jvpreg.estimators import Operator, trace

KIND = "sphere"

Method = Literal["hutchinson", "hutch++", "xtrace"]


def trajectories(lin: Linearization, jacobian: np.ndarray, num_probes: int, counted: int, seed: int) -> dict[str, Any]:
    """Running estimates of ‖J‖_F, and how far theory lets them be off.

    Args:
        lin: at the same input in all examples, one for each trajectory.
        jacobian: the exact one `(K, D)`, in float64.
        num_probes: P.
        counted: more trajectories, by products with the matrix, to count how far they are off.
        seed: of the directions, uniform on the sphere of radius √D.

    Returns:
        `exact`; `trajectories`, the roots of running means of `‖J u‖²`, `(B, P)`; `sem`, the estimate's standard
        deviation after each probe by theory, to first order, `(P,)`; and `spread`, that of the `counted` ones.
    """
    directions = jvpreg.probes.draw(KIND, lin.inputs[0], num_probes, seed)
    products = np.float64(ops.convert_to_numpy(lin.jvp(directions)))
    squares = np.sum(products**2, axis=tuple(range(2, products.ndim))).T
    size = jacobian.shape[1]
    random = np.random.default_rng(seed).normal(size=(counted * num_probes, size))
    random *= np.sqrt(size) / np.linalg.norm(random, axis=1, keepdims=True)
    others = np.sum((random @ jacobian.T) ** 2, axis=1).reshape(counted, num_probes)
    gram = jacobian @ jacobian.T
    trace = np.trace(gram)
    # Of uᵀ G u on the sphere of radius √D.
    variance = 2 * size / (size + 2) * (np.sum(gram**2) - trace**2 / size)
    exact = np.sqrt(trace)
    return {
        "exact": float(exact),
        "trajectories": running(squares).tolist(),
        "sem": (np.sqrt(variance / np.arange(1, num_probes + 1)) / (2 * exact)).tolist(),
        "spread": np.sqrt(np.mean((running(others) - exact) ** 2, axis=0)).tolist(),
        "counted": counted,
    }


def running(squares: np.ndarray) -> np.ndarray:
    """The roots of the means of the first, the first two, … of each row."""
    return np.sqrt(np.cumsum(squares, axis=1) / np.arange(1, squares.shape[1] + 1))


def trace_errors(matrix: np.ndarray, matvecs: list[int], num_seeds: int, seed: int) -> dict[str, Any]:
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
