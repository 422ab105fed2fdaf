"""An incompressible flow in the plane, from noisy measurements at few places."""

from typing import Any

import keras
import numpy as np

from experiments.constraints.config import ConstraintsConfig
from experiments.constraints.fitting import enforcements, fit, gathered, held_out, network, repeated
from jvpreg.constraints import Box, DivergenceFree, verify

PLACES = 200
GRID = 50
DRAWN = 1.1
"""The constraint's points are drawn up to here, so that those at the edge of the square have neighbours outside too."""


def run(config: ConstraintsConfig) -> dict[str, dict[str, Any]]:
    """The figures of each setting, by its name."""
    found: dict[str, list[dict[str, Any]]] = {}
    grid = held_out(GRID)
    for seed in range(config.seeds):
        generator = np.random.default_rng(seed)
        x = generator.uniform(-1, 1, size=(PLACES, 2)).astype("float32")
        y = (flow(x) + config.noise * generator.normal(size=(PLACES, 2))).astype("float32")
        for name, enforcement in enforcements(config).items():
            keras.utils.set_random_seed(seed)
            base = network(2, 2, config.width)
            wanted = DivergenceFree(enforcement=enforcement, at=Box(-DRAWN, DRAWN, config.points))
            draw = repeated(x, y, np.random.default_rng(seed))
            curve = fit(base, [wanted], draw, config, lambda model: verify(model, DivergenceFree(), grid).max, seed)
            report = verify(base, DivergenceFree(), grid)
            off = base.predict(grid, verbose=0, batch_size=4096) - flow(grid)
            figures = {
                "error": float(np.sqrt(np.mean(off**2))),
                "violation_mean": report.mean,
                "violation_max": report.max,
                "violated": report.violated,
                "seconds": curve["seconds"],
            }
            found.setdefault(name, []).append({**figures, "curve": curve})
    return {name: gathered(runs) for name, runs in found.items()}


def flow(x: np.ndarray) -> np.ndarray:
    """The velocity at places `(N, 2)` of the square from −1 to 1: four eddies, of speed 1 at most."""
    a, b = np.pi * x[:, 0], np.pi * x[:, 1]
    return np.stack([np.sin(a) * np.cos(b), -np.cos(a) * np.sin(b)], axis=1)
