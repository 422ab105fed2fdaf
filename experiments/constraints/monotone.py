"""Monotone regression: the progress of diabetes a year on, which rises with some measurements and falls with one."""

from typing import Any

import keras
import numpy as np
from keras import ops

from experiments.constraints.config import ConstraintsConfig
from experiments.constraints.fitting import enforcements, fit, gathered, network, repeated
from jvpreg.constraints import Constraint, Monotone, verify

# Body mass index, blood pressure, triglycerides (log); and HDL cholesterol.
RISING, FALLING = [2, 3, 8], [6]
TEST_PART = 0.25
SWEEP = 41


def run(config: ConstraintsConfig) -> dict[str, dict[str, Any]]:
    """The figures of each setting, by its name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(config.seeds):
        split = patients(seed)
        for name, enforcement in enforcements(config).items():
            keras.utils.set_random_seed(seed)
            base = network(split["train"][0].shape[1], 1, config.width)
            draw = repeated(split["train"][0], split["train"][1], np.random.default_rng(seed))
            wanted = constraints(enforcement=enforcement, at=around)

            def largest(model, split=split):
                return violations(model, split).max()

            curve = fit(base, wanted, draw, config, largest, seed)
            of_points = violations(base, split)
            figures = {
                "error": error(base.predict(split["test"][0], verbose=0), split),
                "violation_mean": float(of_points.mean()),
                "violation_max": float(of_points.max()),
                "violated": float(np.mean(of_points > 1e-3)),
                "largest_fall": largest_fall(lambda x, base=base: base.predict(x, verbose=0, batch_size=4096), split),
                "seconds": curve["seconds"],
            }
            found.setdefault(name, []).append({**figures, "curve": curve})
        for name, predict in boosting(split, seed).items():
            figures = {"error": error(predict(split["test"][0]), split), "largest_fall": largest_fall(predict, split)}
            found.setdefault(name, []).append(figures)
    return {name: gathered(runs) for name, runs in found.items()}


def patients(seed: int) -> dict[str, Any]:
    """Training and test patients, everything in units of the training patients' standard deviation."""
    from sklearn.datasets import load_diabetes
    from sklearn.model_selection import train_test_split

    x, y = load_diabetes(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=TEST_PART, random_state=seed)
    mean, scale = x_train.mean(0), x_train.std(0)
    center, spread = y_train.mean(), y_train.std()

    def part(x, y):
        return ((x - mean) / scale).astype("float32"), ((y - center) / spread).astype("float32")[:, None]

    return {"train": part(x_train, y_train), "test": part(x_test, y_test), "spread": float(spread)}


def constraints(**arguments: Any) -> list[Constraint]:
    """That the outcome rises with some features, and falls with others."""
    return [
        Monotone(RISING, name="rising", **arguments),
        Monotone(FALLING, increasing=False, name="falling", **arguments),
    ]


def around(inputs: Any, seed: keras.random.SeedGenerator) -> Any:
    """Points between patients and beyond them, and off the lines, four for each: test patients are no mixtures."""
    x, other = (ops.tile(patients, (4, 1)) for patients in (inputs, ops.roll(inputs, 1, axis=0)))
    part = keras.random.uniform((ops.shape(x)[0], 1), -0.5, 1.5, seed=seed)
    spread = keras.random.uniform((ops.shape(x)[0], 1), 0.0, 0.7, seed=seed)
    return x + part * (other - x) + spread * keras.random.normal(ops.shape(x), seed=seed)


def violations(model: keras.Model, split: dict[str, Any]) -> np.ndarray:
    """Of the largest component at each test patient, in standard deviations of y by one of x."""
    reports = [verify(model, constraint, split["test"][0]) for constraint in constraints()]
    return np.max([report.violations for report in reports], axis=0)


def error(predicted: np.ndarray, split: dict[str, Any]) -> float:
    """The root mean square error on the test patients, in the units of the data."""
    difference = predicted.reshape(-1) - split["test"][1][:, 0]
    return float(split["spread"] * np.sqrt(np.mean(difference**2)))


def largest_fall(predict: Any, split: dict[str, Any]) -> float:
    """The furthest that a prediction goes the wrong way as one feature of a test patient sweeps the training range."""
    x = split["test"][0]
    worst = 0.0
    for feature, sign in [(i, 1.0) for i in RISING] + [(i, -1.0) for i in FALLING]:
        seen = split["train"][0][:, feature]
        values = np.linspace(seen.min(), seen.max(), SWEEP)
        swept = np.repeat(x[:, None], SWEEP, axis=1)
        swept[:, :, feature] = values
        outcome = sign * np.asarray(predict(swept.reshape(-1, x.shape[1]))).reshape(len(x), SWEEP)
        worst = max(worst, float(np.max(np.maximum.accumulate(outcome, axis=1) - outcome)))
    return worst


def boosting(split: dict[str, Any], seed: int) -> dict[str, Any]:
    """Gradient boosting of scikit-learn, free and monotone: functions from inputs to predictions."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    signs = np.zeros(split["train"][0].shape[1], int)
    signs[RISING], signs[FALLING] = 1, -1
    x, y = split["train"][0], split["train"][1][:, 0]
    settings = {"learning_rate": 0.05, "max_iter": 100, "min_samples_leaf": 10, "random_state": seed}
    return {
        "boosting": HistGradientBoostingRegressor(**settings).fit(x, y).predict,
        "monotone boosting": HistGradientBoostingRegressor(monotonic_cst=signs, **settings).fit(x, y).predict,
    }
