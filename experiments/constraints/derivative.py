"""A function of which few values are known, with and without its gradients there."""

from typing import Any

import keras
import numpy as np

from experiments.constraints.config import ConstraintsConfig
from experiments.constraints.fitting import enforcements, fit, gathered, held_out, network, repeated
from jvpreg.constraints import KnownDerivative, verify

GRID = 40


def run(config: ConstraintsConfig) -> dict[str, dict[str, Any]]:
    """The figures of each setting and number of points, by `name, n points`."""
    found: dict[str, list[dict[str, Any]]] = {}
    grid = held_out(GRID)
    truth = {"slopes": gradient(grid)}
    for seed in range(config.seeds):
        for number in config.examples:
            x = np.random.default_rng(seed).uniform(-1, 1, size=(number, 2)).astype("float32")
            labels = {"value": values(x), "slopes": gradient(x)}
            for name, enforcement in enforcements(config).items():
                keras.utils.set_random_seed(seed)
                base = network(2, 1, config.width)
                known = KnownDerivative("slopes", [0, 1], enforcement=enforcement)
                draw = repeated(x, labels, np.random.default_rng(seed))

                def violation(model):
                    return verify(model, KnownDerivative("slopes", [0, 1]), grid, truth).mean

                curve = fit(base, [known], draw, config, violation, seed)
                off = base.predict(grid, verbose=0, batch_size=4096) - values(grid)
                at_points = verify(base, KnownDerivative("slopes", [0, 1]), x, labels)
                figures = {
                    "error": float(np.sqrt(np.mean(off**2))),
                    "violation_mean": violation(base),
                    "at_points_mean": at_points.mean,
                    "seconds": curve["seconds"],
                }
                found.setdefault(f"{name}, {number} points", []).append(figures)
    return {name: gathered(runs) for name, runs in found.items()}


def values(x: np.ndarray) -> np.ndarray:
    """Two ridges and a dip, `(N, 1)`, of places `(N, 2)`."""
    a, b = x[:, :1], x[:, 1:]
    return np.sin(3 * a + b) + 0.5 * np.cos(4 * b - a)


def gradient(x: np.ndarray) -> np.ndarray:
    """Its gradient, `(N, 2)`."""
    a, b = x[:, :1], x[:, 1:]
    first, second = np.cos(3 * a + b), -0.5 * np.sin(4 * b - a)
    return np.concatenate([3 * first - second, first + 4 * second], axis=1)
