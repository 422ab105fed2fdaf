"""The `estimators` study: figure 4 of the paper, and the trace."""

from typing import Any

import keras
import numpy as np
from keras import ops
from rich.console import Console

import jvpreg
from experiments.errors import ExperimentError
from experiments.estimators import convergence, report
from experiments.estimators.config import EstimatorsConfig
from experiments.estimators.monte_carlo import KIND, trace_errors, trajectories
from experiments.study import Study
from experiments.verify.architectures import unet
from jvpreg.estimators import frobenius_norm, top_eigenvalues, top_singular_values

PAPER_STEPS = 10
PAPER_SAMPLES = 100


def measured(config: EstimatorsConfig, console: Console) -> dict[str, Any]:
    """The data of both figures."""
    check(config)
    model = square_unet(config.image_size, config.seed)
    x = images(config.image_size, config.examples, config.seed)
    lin = jvpreg.linearize(model, x, fallback="error")
    n = x[0].size
    console.log(f"materializing {len(x)} Jacobians of {n}x{n}")
    jacobians = np.asarray(ops.convert_to_numpy(lin.jacobian()), "float64").reshape(len(x), n, n)
    sigma, magnitudes = convergence.exact_values(jacobians)
    curves = []
    block = lin.take(list(range(config.block_examples)))
    for kind, exact in (("singular", sigma), ("eigen", magnitudes)):
        for part, k in ((lin, 1), (block, config.block)):
            console.log(f"seeking {k} {kind} value(s) step by step")
            steps = single_steps(config) if k == 1 else sorted(config.steps)
            known = exact[: len(part.inputs[0])]
            curves.append(convergence.convergence(part, k, steps, known, kind, config.seed))
    console.log("drawing trajectories of the Frobenius norm")
    same = jvpreg.linearize(model, np.repeat(x[:1], config.trajectories, axis=0), fallback="error")
    norm = trajectories(same, jacobians[0], config.num_probes, 32 * config.trajectories, config.seed)
    console.log("timing")
    times = timed(model, config)
    console.log("estimating traces")
    return {
        "figure4": {"convergence": curves, "frobenius_norm": norm, "seconds": times},
        "trace": matrices(jacobians[0], config),
    }


def check(config: EstimatorsConfig) -> None:
    """Raises where the settings do not fit each other."""
    if config.image_size % 4:
        raise ExperimentError(f"image_size: expected a multiple of 4. Received: {config.image_size}.")
    if config.block_examples > config.examples:
        raise ExperimentError("block_examples: expected no more than examples.")
    if config.block + 2 > 3 * config.image_size**2:
        raise ExperimentError("block: expected fewer values than the Jacobian has.")


def single_steps(config: EstimatorsConfig) -> list[int]:
    """The steps for one value."""
    return sorted({*config.steps, *range(5, config.single_steps + 1, 5)})


def timed(model: keras.Model, config: EstimatorsConfig) -> list[dict[str, Any]]:
    """Ten steps for one value and for a block of them, and the probes of the norm, at as many images as it says."""
    number = config.timed_examples
    few = max(1, number // 10)
    x = images(config.image_size, number, config.seed)

    def once(function):
        """Of images, linearized in the same call."""
        return lambda x: function(jvpreg.linearize(model, x, fallback="error"))

    def singular(k):
        return once(lambda lin: top_singular_values(lin, k, convergence.NEVER, PAPER_STEPS, 0).value)

    def eigen(k):
        return once(lambda lin: top_eigenvalues(lin, k, convergence.NEVER, PAPER_STEPS, 0).value)

    def norm():
        return once(lambda lin: frobenius_norm(lin, PAPER_SAMPLES, probes=KIND).value)

    rows = [
        ("top_eigenvalues, k=1, 10 steps", eigen(1), number, 3.12 if number == PAPER_SAMPLES else None),
        (
            f"top_eigenvalues, k={config.block}, 10 steps",
            eigen(config.block),
            few,
            16.0 if (config.block, few) == (50, 10) else None,
        ),
        ("top_singular_values, k=1, 10 steps", singular(1), number, None),
        (f"top_singular_values, k={config.block}, 10 steps", singular(config.block), few, None),
        (f"frobenius_norm, {PAPER_SAMPLES} probes", norm(), 1, 0.013),
    ]
    return [
        {
            "what": what,
            "images": count,
            "seconds": convergence.seconds(function, ops.convert_to_tensor(x[:count])),
            "paper_seconds": paper,
        }
        for what, function, count, paper in rows
    ]


def matrices(jacobian: np.ndarray, config: EstimatorsConfig) -> dict[str, Any]:
    """The errors of the trace of each matrix, by its label."""
    n = config.trace_dimension
    numbers = np.arange(n)
    named = {
        "eigenvalues 1/i²": symmetric(1.0 / (1 + numbers) ** 2, config.seed),
        f"the UNet's Jacobian, n={len(jacobian)}": jacobian,
        "eigenvalues from 1 to 3": symmetric(np.linspace(3.0, 1.0, n), config.seed),
    }
    matvecs = [count for count in sorted(config.trace_matvecs) if count < n]
    return {label: trace_errors(matrix, matvecs, config.trace_seeds, config.seed) for label, matrix in named.items()}


def square_unet(image_size: int, seed: int) -> keras.Model:
    """The UNet of `verify`, never trained, with as many channels out as in."""
    keras.utils.set_random_seed(seed)
    network = unet((image_size, image_size, 3))
    features = network.layers[-1].input
    return keras.Model(network.input, keras.layers.Conv2D(3, 1, name="pixels")(features))


def images(image_size: int, number: int, seed: int) -> np.ndarray:
    """Random inputs `(B, H, W, 3)`, standard normal, as in the paper."""
    shape = (number, image_size, image_size, 3)
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def symmetric(eigenvalues: np.ndarray, seed: int) -> np.ndarray:
    """A symmetric matrix with those eigenvalues, in a random basis."""
    n = len(eigenvalues)
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    return basis * eigenvalues @ basis.T


STUDY = Study("estimators", measured, report.page, {"figure4": report.figure4, "trace": report.trace}, indent=1)
