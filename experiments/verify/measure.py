"""The errors of one architecture, figure by figure."""

import contextlib
import functools
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import keras
import numpy as np

import jvpreg
from experiments import processes
from experiments.processes import reason
from experiments.verify import weights
from experiments.verify.architectures import Architecture
from experiments.verify.config import VerifyConfig
from experiments.verify.products import Products

FLOAT64 = ("jvp", "vjp", "weight_jvp", "completeness")
FLOAT32 = ("float32_autodiff", "float32_jvpreg")
JIT = ("jit_autodiff", "jit_jvpreg")
MIXED = {
    "mixed_float16": ("float16_autodiff", "float16_jvpreg"),
    "mixed_bfloat16": ("bfloat16_autodiff", "bfloat16_jvpreg"),
}
FIGURES = (*FLOAT64, *FLOAT32, *JIT, *(name for names in MIXED.values() for name in names))


def row(architecture: Architecture, config: VerifyConfig) -> dict[str, Any]:
    """What could be measured of an architecture within the time limit; `failure` says why the rest was not."""
    return processes.row(figures, (architecture, config), config.time_limit, {"JAX_ENABLE_X64": "1"})


def figures(architecture: Architecture, config: VerifyConfig) -> Iterator[dict[str, Any]]:
    """In a process of its own: parts of a row, so that what is there is kept if the rest takes too long.

    An error is `‖received − expected‖ / ‖expected‖`. Expected is autodiff without jit in float64, of the same
    weights, inputs and directions, all of which float32 can hold.
    """
    start = time.perf_counter()
    random = np.random.default_rng(config.seed)
    keras.utils.set_random_seed(config.seed)
    model = architecture.make(architecture.input_shape)
    weights.draw(model, random)
    x = weights.inputs(model, config.batch_size, random)
    u = random.normal(size=x.shape).astype("float32")
    yield {"parameters": model.count_params()}
    with jvpreg.testing.float64():
        exact = made_again(architecture, model)
        expected = yield from _figures_in_float64(Products(exact, x), u, random)
    del exact
    yield from _figures_of_jvp(lambda: Products(model, x), FLOAT32, u, expected)
    if config.jit:
        yield from _figures_of_jvp(lambda: Products(model, x, jit=True), JIT, u, expected)
    # Last, because a row is complete without them.
    for policy, names in MIXED.items():
        with _dtype_policy(policy):
            yield from _figures_of_jvp(lambda: Products(made_again(architecture, model), x), names, u, expected)
    yield {"seconds": time.perf_counter() - start}


def _figures_in_float64(
    products: Products, u: np.ndarray, random: np.random.Generator
) -> Generator[dict[str, Any], None, np.ndarray]:
    """The figures without jit; returns autodiff's `J u`, which float32 is held against."""
    expected = products.autodiff_jvp(u)
    yield {"jacobian": float(np.linalg.norm(expected) / np.linalg.norm(u))}
    # Whatever else fails, this says of which node.
    lin = products.linearize(products.x)
    kernel = middle_kernel(lin.weights)
    yield {"nodes": len(lin.nodes), "weight": kernel.path}
    direction = random.normal(size=kernel.shape)
    v = random.normal(size=expected.shape)
    yield from _figure("jvp", lambda: error(products.jvp(u), expected))
    yield from _figure("vjp", lambda: error(products.vjp(v), products.autodiff_vjp(v)))
    yield from _figure(
        "weight_jvp",
        lambda: error(products.weight_jvp([kernel], [direction]), products.autodiff_weight_jvp([kernel], [direction])),
    )
    yield from _figure("completeness", lambda: error(products.completion(), products.outputs()))
    return expected


def _figures_of_jvp(
    make: Callable[[], Products], names: tuple[str, str], u: np.ndarray, expected: np.ndarray
) -> Iterator[dict[str, Any]]:
    by_autodiff, by_jvpreg = names
    # Made within a figure, so that what cannot be made is a failure of that figure and not of the row.
    products = functools.cache(make)
    yield from _figure(by_jvpreg, lambda: error(products().jvp(u), expected))
    yield from _figure(by_autodiff, lambda: error(products().autodiff_jvp(u), expected))


def made_again(architecture: Architecture, model: keras.Model) -> keras.Model:
    """The model with the same weights, under the dtype policy that Keras is set to."""
    made = architecture.make(architecture.input_shape)
    made.set_weights(model.get_weights())
    return made


@contextlib.contextmanager
def _dtype_policy(name: str) -> Iterator[None]:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def middle_kernel(variables: list) -> Any:
    """The kernel that stands in the middle of those a model uses."""
    kernels = [variable for variable in variables if variable.name.endswith("kernel")]
    return kernels[len(kernels) // 2]


def error(received: np.ndarray, expected: np.ndarray) -> float:
    """`‖received − expected‖ / ‖expected‖`."""
    assert received.shape == expected.shape
    return float(np.linalg.norm(np.float64(received) - expected) / np.linalg.norm(expected))


def _figure(name: str, measured: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """The figure; or why there is none, so that the others go on."""
    try:
        yield {name: measured()}
    except Exception as cause:
        yield {f"{name}_failure": reason(cause)}
