"""What the regressions share: the network, its training, and what is measured of it."""

import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers

import jvpreg
from experiments.constraints.config import ConstraintsConfig
from jvpreg.constraints import AugmentedLagrangian, Constraint, Penalty

AUGMENTED = "augmented Lagrangian"
FREE = "no constraint"


def enforcements(config: ConstraintsConfig) -> dict[str, Penalty | AugmentedLagrangian]:
    """How each run enforces the constraint, by the run's name; a penalty of weight 0 only measures."""
    named: dict[str, Penalty | AugmentedLagrangian] = {
        f"penalty {strength:g}" if strength else FREE: Penalty(strength) for strength in config.strengths
    }
    if config.rho is not None:
        named[AUGMENTED] = AugmentedLagrangian(config.rho, config.update_every)
    return named


def network(inputs: int, outputs: int, width: int) -> keras.Model:
    """Two hidden layers with tanh."""
    hidden = [layers.Dense(width, activation="tanh") for _ in range(2)]
    return keras.Sequential([keras.Input((inputs,)), *hidden, layers.Dense(outputs)])


def fit(
    base: keras.Model,
    constraints: list[Constraint],
    draw: Callable[[int], tuple[Any, Any]],
    config: ConstraintsConfig,
    measure: Callable[[keras.Model], float],
    seed: int,
) -> dict[str, Any]:
    """Train a network.

    Args:
        base: the network.
        constraints: which are enforced.
        draw: returns so many training examples, with repetition, in an order of its own.
        config: how long.
        measure: the violation on held-out points.
        seed: of the directions and points of the constraints.

    Returns:
        The `steps` and the `violation` measured at them, and the `seconds` that the steps took, the first epoch, in
        which everything is compiled, left out and made up for.
    """
    model = jvpreg.JacobianModel(base, seed=seed)
    each = max(1, config.steps // config.measurements)
    total = each * config.measurements
    schedule = keras.optimizers.schedules.CosineDecay(config.learning_rate, total)
    model.compile(keras.optimizers.Adam(schedule), "mse", jacobian_regularizers=constraints)
    curve: dict[str, Any] = {"steps": [0], "violation": [float(measure(base))], "seconds": 0.0}
    seconds = []
    for epoch in range(config.measurements):
        x, y = draw(each * config.batch_size)
        start = time.perf_counter()
        model.fit(x, y, batch_size=config.batch_size, shuffle=False, verbose=0)
        seconds.append(time.perf_counter() - start)
        curve["steps"].append((epoch + 1) * each)
        curve["violation"].append(float(measure(base)))
    timed = seconds[1:] or seconds
    curve["seconds"] = sum(timed) * config.measurements / len(timed)
    return curve


def repeated(x: np.ndarray, y: Any, generator: np.random.Generator) -> Callable[[int], tuple[Any, Any]]:
    """Draws from examples: all of them in a random order, again and again."""

    def draw(count):
        rounds = -(-count // len(x))
        order = np.concatenate([generator.permutation(len(x)) for _ in range(rounds)])[:count]
        return x[order], {key: value[order] for key, value in y.items()} if isinstance(y, dict) else y[order]

    return draw


def held_out(count: int) -> np.ndarray:
    """A grid of so many places by as many in the square from −1 to 1, `(N, 2)`; none of them is drawn in training."""
    axis = (np.arange(count) + 0.5) * 2 / count - 1
    return np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2).astype("float32")


def mean_and_sem(values: list[float]) -> dict[str, float | None]:
    """The mean, and its standard error where there are several values."""
    array = np.asarray(values, "float64")
    sem = float(array.std(ddof=1) / np.sqrt(len(array))) if len(array) > 1 else None
    return {"mean": float(array.mean()), "sem": sem}


def gathered(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of several seeds: of each its mean and standard error, and the curves as they are."""
    figures = {key: mean_and_sem([run[key] for run in runs]) for key in runs[0] if key != "curve"}
    return {**figures, "curves": [run["curve"] for run in runs if "curve" in run]}
