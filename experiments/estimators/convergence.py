"""The largest singular values and eigenvalues, step by step: ours and the paper's iterations."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

import jvpreg
from experiments.benchmark import calls, measure
from jvpreg import Linearization
from jvpreg.estimators import top_eigenvalues, top_singular_values

NEVER = 1e-30
"""A tolerance that is not met, so that all steps are taken."""


def rows_of(product: Callable, like: Any) -> Callable:
    """A product with a Jacobian as one of vectors `(B, k, n)`."""
    shape = tuple(like.shape)

    def apply(rows):
        count = rows.shape[1]
        image = product(ops.reshape(ops.transpose(rows, (1, 0, 2)), (count, *shape)))
        return ops.transpose(ops.reshape(image, (count, shape[0], -1)), (1, 0, 2))

    return apply


def orthonormal(rows: Any) -> tuple:
    """Q as rows `(B, k, n)` and R `(B, k, k)` of the vectors' QR decomposition."""
    columns, triangle = ops.qr(ops.transpose(rows, (0, 2, 1)))
    return ops.transpose(columns, (0, 2, 1)), triangle


def paper_singular_values(lin: Linearization, k: int, num_steps: int, seed: int) -> list:
    """Algorithm 4 of the paper: σ after each step, `(B, k)`. A step is k products with `J` and k with `Jᵀ`."""
    forward, backward = rows_of(lin.jvp, lin.inputs[0]), rows_of(lin.vjp, lin.outputs)
    v = starting_vectors(lin, k, seed)
    found = []
    for _ in range(num_steps):
        u, _ = orthonormal(forward(v))
        v, triangle = orthonormal(backward(u))
        found.append(ops.abs(ops.diagonal(triangle, axis1=1, axis2=2)))
    return found


def paper_eigenvalues(lin: Linearization, k: int, num_steps: int, seed: int) -> list:
    """Algorithm 2 of the paper: the magnitudes |λ| after each step, `(B, k)`. A step is k products with `J`."""
    forward = rows_of(lin.jvp, lin.inputs[0])
    v, found = starting_vectors(lin, k, seed), []
    for _ in range(num_steps):
        v, triangle = orthonormal(forward(v))
        found.append(ops.abs(ops.diagonal(triangle, axis1=1, axis2=2)))
    return found


def starting_vectors(lin: Linearization, k: int, seed: int) -> Any:
    """Random vectors `(B, k, n)`, orthonormal, so that the first R has the scale of `J`."""
    drawn = jvpreg.probes.draw("gaussian", lin.inputs[0], k, seed)
    return orthonormal(ops.transpose(ops.reshape(drawn, (k, drawn.shape[1], -1)), (1, 0, 2)))[0]


def exact_values(jacobians: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All singular values and the magnitudes of all eigenvalues `(B, n)`, the largest first, in float64."""
    matrices = np.float64(jacobians)
    sigma = np.sqrt(np.maximum(np.linalg.eigvalsh(matrices @ np.swapaxes(matrices, 1, 2))[:, ::-1], 0))
    return sigma, np.sort(np.abs(np.linalg.eigvals(matrices)))[:, ::-1]


def convergence(lin: Linearization, k: int, steps: list[int], exact: np.ndarray, kind: str, seed: int) -> dict:
    """Errors of the k largest values after each number of steps: the worst of the k, relative to the largest.

    Args:
        lin: of B examples.
        k: how many values.
        steps: numbers of steps.
        exact: all values `(B, n)`, for eigenvalues their magnitudes.
        kind: "singular" or "eigen".
        seed: of the starting vectors.

    Returns:
        `steps`, and by method and example the errors: `ours` and `paper`, `(steps, B)`, with `reported`: our own
        residuals in the same way.
    """
    size = exact.shape[1]
    paper = (paper_singular_values if kind == "singular" else paper_eigenvalues)(lin, k, max(steps), seed)
    # With so many steps ours would materialize the Jacobian, which is exact.
    ours_steps = [q for q in steps if (2 * k * q if kind == "singular" else (k + 2) * q) < size]
    ours, reported = [], []
    for q in ours_steps:
        estimator = top_singular_values if kind == "singular" else top_eigenvalues
        estimate = estimator(lin, k=k, tolerance=NEVER, num_iterations=q, max_restarts=0, seed=seed)
        ours.append(worst(np.abs(ops.convert_to_numpy(estimate.value)) - exact[:, :k], exact))
        reported.append(worst(ops.convert_to_numpy(estimate.residual), exact))
    return {
        "kind": kind,
        "k": k,
        "examples": len(exact),
        "steps": steps,
        "paper": [worst(ops.convert_to_numpy(paper[q - 1]) - exact[:, :k], exact) for q in steps],
        "ours_steps": ours_steps,
        "ours": ours,
        "reported": reported,
    }


def worst(off: np.ndarray, exact: np.ndarray) -> list[float]:
    """The largest of k errors, relative to the largest value, for each example."""
    return (np.max(np.abs(off), axis=1) / exact[:, 0]).tolist()


def seconds(function: Callable, *arguments: Any) -> float:
    """What a call takes after a first one: a graph on TensorFlow, by `jax.jit` on JAX, and as it is on Torch."""
    # A partial, because TensorFlow takes functions of one code for one that is traced again, and warns.
    jitted = calls.compiled(functools.partial(function), jit=keras.backend.backend() == "jax")

    def call() -> None:
        calls.wait(jitted(*arguments))

    measure.turn(call)
    return measure.turn(call)
