"""The `gan` study: what a critic's gradient penalty does to its gradient, and to the digits that are generated."""

import functools
import itertools
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from rich.console import Console

import jvpreg
from experiments import cells, data
from experiments.config import DataConfig, as_plain_dict
from experiments.gan import report
from experiments.gan.config import GanConfig
from experiments.study import Study, one_table

PIXELS = 64
MEASURED = 1000
"""Generated digits, and points between them and real ones, of which each figure is made."""


def measured(config: GanConfig, console: Console) -> dict[str, Any]:
    """A row a strength, of the cells that are trained now or were before."""
    digits = data.load(DataConfig("digits"))
    shared = as_plain_dict(config, without=("strengths", "seeds", "folder"))
    keyed = [
        (
            strength,
            cells.Cell(
                Path(config.folder) / "cells" / f"{report.name(strength)}, seed {seed}.json",
                {**shared, "strength": strength, "seed": seed},
                functools.partial(trained, config, digits, strength, seed),
            ),
        )
        for strength, seed in itertools.product(config.strengths, config.seeds)
    ]

    def told(result: dict[str, Any]) -> str:
        return f"‖∇f‖ {result['norm'][-1]:.3g}, distance {result['distance'][-1]:.3g}"

    found = cells.by_key(keyed, console, told)
    rows = [{"strength": strength, "results": results} for strength, results in found.items()]
    return {"training_digits": frechet_distance(flat(digits.test), flat(digits.train)[:MEASURED]), "rows": rows}


def flat(split: data.Split) -> np.ndarray:
    """Its digits, `(N, PIXELS)`."""
    return split.images().reshape(-1, PIXELS)


def network(inputs: int, outputs: int, config: GanConfig, last: str | None = None) -> keras.Model:
    """Two hidden layers: a generator or a critic."""
    hidden = [layers.Dense(config.width, activation="leaky_relu") for _ in range(2)]
    return keras.Sequential([keras.Input((inputs,)), *hidden, layers.Dense(outputs, activation=last)])


def wasserstein(labels: Any, scores: Any) -> Any:
    """What the critic lowers, with labels 1 for real and −1 for generated; the generator, with labels 1."""
    return -labels * scores


def trained(config: GanConfig, digits: data.Dataset, strength: float, seed: int) -> dict[str, Any]:
    """Train one cell.

    Returns:
        At each snapshot the `epochs` until then, the mean `norm` of the critic's gradient between test digits and
        generated ones, their Fréchet `distance`, and `pictures` of generated digits.
    """
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    real, test = flat(digits.train), flat(digits.test)
    generator, base = network(config.noise, PIXELS, config, "sigmoid"), network(PIXELS, 1, config)
    critic = jvpreg.JacobianModel(base, seed=seed)
    penalties = [jvpreg.regularizers.GradientPenalty(strength)] if strength else []
    critic.compile(adam(config), wasserstein, jacobian_regularizers=penalties)
    judged = keras.Sequential([generator, base])
    judged.compile(adam(config), wasserstein)
    random, result = np.random.default_rng(seed), dict[str, list]()
    labels = np.repeat(np.array([[1.0], [-1.0]], "float32"), config.batch_size, axis=0)
    snapshots = {round(part * config.epochs) for part in np.linspace(0, 1, config.snapshots + 1)}
    for epoch in range(config.epochs + 1):
        if epoch in snapshots:
            for key, value in {"epochs": epoch, **looked_at(generator, base, test, config, seed)}.items():
                result.setdefault(key, []).append(value)
        for _ in range(len(real) // config.batch_size if epoch < config.epochs else 0):
            base.trainable = True
            noise = drawn(random, config.critic_steps * config.batch_size, config)
            for generated in np.split(ops.convert_to_numpy(generator(noise)), config.critic_steps):
                chosen = random.integers(len(real), size=config.batch_size)
                critic.train_on_batch(np.concatenate([real[chosen], generated]), labels)
            base.trainable = False  # the generator's steps move the generator alone
            judged.train_on_batch(drawn(random, config.batch_size, config), labels[: config.batch_size])
    return result


def adam(config: GanConfig) -> keras.optimizers.Optimizer:
    """As Gulrajani et al. have it, with little momentum, as the two networks move each other's goal."""
    return keras.optimizers.Adam(config.learning_rate, beta_1=0.5, beta_2=0.9)


def drawn(random: np.random.Generator, count: int, config: GanConfig) -> np.ndarray:
    """Noise, `(count, noise)`."""
    return random.normal(size=(count, config.noise)).astype("float32")


def looked_at(
    generator: keras.Model, critic: keras.Model, test: np.ndarray, config: GanConfig, seed: int
) -> dict[str, Any]:
    """What a snapshot says; the same noise and the same pairs in each."""
    random = np.random.default_rng((seed, 1))
    generated = ops.convert_to_numpy(generator(drawn(random, MEASURED, config)))
    part = random.random((MEASURED, 1)).astype("float32")
    points = generated + part * (test[random.integers(len(test), size=MEASURED)] - generated)
    gradient = ops.convert_to_numpy(jvpreg.vjp(critic, points, np.ones((1, MEASURED, 1), "float32"))[0])
    return {
        "norm": float(np.linalg.norm(gradient, axis=1).mean()),
        "distance": frechet_distance(test, generated),
        "pictures": ["".join(f"{round(15 * pixel):x}" for pixel in one) for one in generated[: config.shown].tolist()],
    }


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Between the normal distributions with the mean and covariance of two samples, `(N, D)`."""
    means, covariances = zip(*((x.mean(axis=0), np.cov(x, rowvar=False)) for x in (one, other)), strict=True)
    variances, axes = np.linalg.eigh(covariances[0])
    half = axes * np.sqrt(np.maximum(variances, 0)) @ axes.T
    # The singular values of the product of the roots: neither covariance need be invertible.
    between = np.sqrt(np.maximum(np.linalg.eigvalsh(half @ covariances[1] @ half), 0)).sum()
    square = np.sum((means[0] - means[1]) ** 2) + np.trace(covariances[0] + covariances[1]) - 2 * between
    return float(np.sqrt(max(square, 0.0)))


STUDY = Study(
    "gan",
    measured,
    one_table("rows", report.columns, report.caption),
    {"digits": report.digits, "curves": report.curves},
)
