"""What `benchmark probe` measures: estimators and products, each with what float64 says that it should be."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from keras import ops

from experiments.benchmark.directions import FEEDBACK, following
from jvpreg import Linearization, estimators

NUM_PROBES = 16
TOL = 1e-3  # of σ₁
FEW, MANY = 1, 9
"""Products of the entries from whose difference the cost of a further one follows."""

CALLBACK = "callback"
"""The entry that is compiled by `JacobianProbe` itself."""

SEM_FACTOR = 5.0
"""Standard errors that an estimate from random probes may be off."""


class Found(NamedTuple):
    """One tensor of an entry, and how far it is off.

    Attributes:
        value: `(B, …)`, as it was computed.
        exact: what it should be.
        slack: by which it may be off, beside rounding: of an estimate, by its own account; else 0.
    """

    value: np.ndarray
    exact: np.ndarray
    slack: np.ndarray | float = 0.0

    def errors(self, rounding: float) -> tuple[float, float]:
        """Error and what it may be, both relative to the largest exact value, where the two are least far apart."""
        scale = float(np.max(np.abs(self.exact)))
        off = np.abs(np.float64(self.value) - self.exact) / scale
        allowed = rounding + np.broadcast_to(np.float64(self.slack) / scale, off.shape)
        # A value that is not a number is infinitely far off.
        worst = np.unravel_index(np.argmax(np.nan_to_num(off - allowed, nan=np.inf)), off.shape)
        return float(np.nan_to_num(off[worst], nan=np.inf)), float(allowed[worst])


Compute = Callable[[Linearization], tuple[list, Any]]
"""From a linearization to tensors, and the number of products with each example."""

Check = Callable[[list[np.ndarray], np.ndarray, np.ndarray], list[Found]]
"""From the tensors of an entry, the Jacobians `(B, K, D)` in float64 and the outputs `f(x)`, what they should be."""


@dataclass(frozen=True)
class Entry:
    """One call that is timed.

    Attributes:
        name: in the files.
        label: in the table and in the figure.
        network: the model that it is called on: "classifier" or "unet".
        compute: see `Compute`; None for the plain model's forward pass.
        check: see `Check`.
    """

    name: str
    label: str
    network: Literal["classifier", "unet"]
    compute: Compute | None
    check: Check


def outputs(tensors: list[np.ndarray], jacobians: np.ndarray, exact: np.ndarray) -> list[Found]:
    """`f(x)`, of a forward pass and of the linearization alone."""
    return [Found(tensors[0], exact)]


norm = functools.partial(estimators.frobenius_norm, num_probes=NUM_PROBES)
sigma = functools.partial(estimators.spectral_norm, tolerance=TOL)
stable_rank = functools.partial(estimators.stable_rank, num_probes=NUM_PROBES, tolerance=TOL)
top_singular_values = functools.partial(estimators.top_singular_values, k=5, tolerance=TOL)


def estimates(*computed: Callable[[Linearization], estimators.Estimate]) -> Compute:
    """The value, the standard error and the residual of each of some estimators, of one linearization."""

    def compute(lin: Linearization) -> tuple[list, Any]:
        found = [estimator(lin) for estimator in computed]
        tensors = [tensor for estimate in found for tensor in (estimate.value, estimate.sem, estimate.residual)]
        return tensors, sum(estimate.num_matvecs for estimate in found)

    return compute


def check_frobenius_norm(tensors: list[np.ndarray], jacobians: np.ndarray, exact: np.ndarray) -> list[Found]:
    """Within standard errors, of which an exact norm has none."""
    value, sem, _ = tensors
    return [Found(value, np.sqrt(np.sum(jacobians**2, axis=(1, 2))), SEM_FACTOR * sem)]


def check_singular_values(tensors: list[np.ndarray], jacobians: np.ndarray, exact: np.ndarray) -> list[Found]:
    """Within the residual, which is 0 but for rounding where the Jacobian was materialized."""
    value, _, residual = tensors
    right = np.linalg.svd(jacobians, compute_uv=False)
    right = right[:, 0] if value.ndim == 1 else right[:, : value.shape[1]]
    # Of a residual above the tolerance no more is believed.
    return [Found(value, right, np.minimum(residual, TOL * np.max(right)))]


def check_probe(tensors: list[np.ndarray], jacobians: np.ndarray, exact: np.ndarray) -> list[Found]:
    """Of both."""
    values = check_frobenius_norm(tensors[:3], jacobians, exact)
    return values + check_singular_values(tensors[3:], jacobians, exact)


def check_callback(tensors: list[np.ndarray], jacobians: np.ndarray, exact: np.ndarray) -> list[Found]:
    """The same two values of each example, of materialized Jacobians."""
    zero = np.zeros(len(jacobians))
    return check_probe([tensors[0], zero, zero, tensors[1], zero, zero], jacobians, exact)


def check_stable_rank(tensors: list[np.ndarray], jacobians: np.ndarray, exact: np.ndarray) -> list[Found]:
    """Of the materialized Jacobian."""
    values = np.linalg.svd(jacobians, compute_uv=False)
    squares = values**2
    # Of a Jacobian of zeros it is 0.
    return [Found(tensors[0], np.sum(squares, axis=1) / np.where(squares[:, 0] > 0, squares[:, 0], 1.0))]


WIDTH = 0.02


def spectral_density(lin: Linearization) -> tuple[list, Any]:
    """At 64 points."""
    density = estimators.spectral_density(lin, width=WIDTH)
    return [density.points, density.value], density.num_matvecs


def check_spectral_density(tensors: list[np.ndarray], jacobians: np.ndarray, exact: np.ndarray) -> list[Found]:
    """A Gaussian around each singular value; relative to the largest, of which the width is a part."""
    points, value = tensors
    values = np.linalg.svd(jacobians, compute_uv=False)
    largest = np.where(values[:, :1] > 0, values[:, :1], 1.0)  # of a Jacobian of zeros, 1
    width = WIDTH * largest[:, :, None]
    expected = np.linspace(0.0, 1.1, points.shape[1]) * largest
    bells = sum(np.exp(-0.5 * ((values[:, None] + sign * expected[:, :, None]) / width) ** 2) for sign in (-1, 1))
    height = np.mean(bells, axis=2) / (width[:, :, 0] * np.sqrt(2 * np.pi))
    # A density this narrow moves by 1 / width times as much as a singular value does.
    return [Found(points, expected), Found(value, height, 1e-4 / WIDTH * np.max(height))]


def products(kind: Literal["jvp", "vjp"], count: int) -> Compute:
    """So many products one after the other, each with a vector that depends on the product before."""

    def compute(lin: Linearization) -> tuple[list, Any]:
        product = lin.jvp if kind == "jvp" else lin.vjp
        like = lin.inputs[0] if kind == "jvp" else lin.outputs

        def step(_, state):
            vector = following(*state)
            return vector, product(vector)

        vector = ops.ones_like(like)
        state = vector, product(vector)
        return [ops.fori_loop(1, count, step, state)[1] if count > 1 else state[1]], count

    return compute


def check_products(kind: Literal["jvp", "vjp"], count: int) -> Check:
    """The same by the matrices."""

    def check(tensors: list[np.ndarray], jacobians: np.ndarray, exact: np.ndarray) -> list[Found]:
        matrices = jacobians if kind == "jvp" else np.swapaxes(jacobians, 1, 2)
        vector = np.ones((len(matrices), matrices.shape[2]))
        image = np.einsum("bmn,bn->bm", matrices, vector)
        for _ in range(1, count):
            mean = np.mean(image, axis=1, keepdims=True)
            vector = vector + FEEDBACK * mean / (1 + np.abs(mean))
            image = np.einsum("bmn,bn->bm", matrices, vector)
        return [Found(np.reshape(tensors[0], image.shape), image)]

    return check


def nothing(lin: Linearization) -> tuple[list, Any]:
    """No product: the linearization alone."""
    return [], 0


ENTRIES = (
    Entry("forward", "forward pass", "classifier", None, outputs),
    Entry("linearize", "linearize alone", "classifier", nothing, outputs),
    Entry("probe", "full probe", "classifier", estimates(norm, sigma), check_probe),
    Entry(CALLBACK, "JacobianProbe.measure()", "classifier", estimates(norm, sigma), check_callback),
    Entry("frobenius_norm", "frobenius_norm", "classifier", estimates(norm), check_frobenius_norm),
    Entry("spectral_norm", "spectral_norm", "classifier", estimates(sigma), check_singular_values),
    Entry("stable_rank", "stable_rank", "classifier", estimates(stable_rank), check_stable_rank),
    Entry(
        "top_singular_values",
        "top_singular_values",
        "classifier",
        estimates(top_singular_values),
        check_singular_values,
    ),
    Entry("spectral_density", "spectral_density", "classifier", spectral_density, check_spectral_density),
    *(
        Entry(f"{kind}_{count}", f"{count} × {kind}", "classifier", products(kind, count), check_products(kind, count))
        for kind in ("jvp", "vjp")
        for count in (FEW, MANY)
    ),
    Entry("unet_forward", "UNet: forward pass", "unet", None, outputs),
    Entry("unet_linearize", "UNet: linearize alone", "unet", nothing, outputs),
    Entry("unet_frobenius_norm", "UNet: frobenius_norm", "unet", estimates(norm), check_frobenius_norm),
    Entry("unet_spectral_norm", "UNet: spectral_norm", "unet", estimates(sigma), check_singular_values),
)
