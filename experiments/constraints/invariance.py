"""Invariance to small rotations and shifts: a constraint on tangents against augmentation at equal compute."""

import functools
import math
import time
from typing import Any

import keras
import numpy as np
from keras import ops

import jvpreg
from experiments import data, models
from experiments.benchmark import measure
from experiments.constraints.config import ConstraintsConfig
from experiments.constraints.fitting import FREE, enforcements, gathered
from jvpreg.constraints import Invariant, tangents, verify

AUGMENTATION = "augmentation"
FREE_LONGER = f"{FREE}, as long"
EXAMPLES = 1000
TIMED_STEPS = 20
# Batches: a call for each would cost more than what it does.
MOVED_TOGETHER = 16


def run(config: ConstraintsConfig) -> dict[str, dict[str, Any]]:
    """The figures of each setting, by its name."""
    dataset = data.load(config.data)
    settings = {name: (enforcement, None) for name, enforcement in enforcements(config).items()}
    steps = equal_compute(config, dataset, settings)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(config.seeds):
        for name, count in steps.items():
            enforcement = settings[name][0] if name in settings and name != FREE else None
            augment = name == AUGMENTATION
            model, seconds = trained(config, dataset, enforcement, augment, count, seed)
            figures = {"steps": float(count), "seconds": seconds, **accuracies(model.base, dataset.test, config)}
            found.setdefault(name, []).append(figures)
    return {name: gathered(runs) for name, runs in found.items()}


def equal_compute(config: ConstraintsConfig, dataset: data.Dataset, settings: dict[str, Any]) -> dict[str, int]:
    """Training steps of each setting: those without a constraint take as many more as theirs are cheaper.

    What it takes to move images is not counted: a pipeline of its own can do it beside the training.
    """
    names = [name for name in settings if name != FREE]
    costs = []
    for enforcement in (None, settings[names[0]][0]):
        model = compiled(config, dataset, enforcement, TIMED_STEPS, seed=0)
        batches = [Batches(dataset.train, config, False, TIMED_STEPS, seed=0)[i] for i in range(TIMED_STEPS)]
        model.train_on_batch(*batches[0])
        taken = [measure.turn(functools.partial(model.train_on_batch, *batch)) for batch in batches]
        costs.append(float(np.median(taken)))
    longer = round(config.steps * costs[1] / costs[0])
    return {FREE: config.steps, FREE_LONGER: longer, AUGMENTATION: longer} | dict.fromkeys(names, config.steps)


def fields() -> list[Any]:
    """The tangents: of a rotation by a degree, and of shifts by a pixel along rows and columns."""
    return [tangents.Rotation(size=math.pi / 180), tangents.Translation()]


class Batches(keras.utils.PyDataset):
    """So many training batches, shuffled, and moved at random if wanted."""

    def __init__(self, split: data.Split, config: ConstraintsConfig, augment: bool, steps: int, seed: int):
        super().__init__()
        self.config, self.augment, self.steps = config, augment, steps
        self.images, self.labels = split.images(), split.labels
        self.seed = seed
        self.number: int | None = None
        self.several = self.images[:0], self.labels[:0]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        number, place = divmod(index, MOVED_TOGETHER)
        if number != self.number:
            generator = np.random.default_rng((self.seed, number))
            chosen = generator.integers(0, len(self.images), size=MOVED_TOGETHER * self.config.batch_size)
            images = self.images[chosen]
            self.several = moved(images, self.config, generator) if self.augment else images, self.labels[chosen]
            self.number = number
        part = slice(place * self.config.batch_size, (place + 1) * self.config.batch_size)
        return self.several[0][part], self.several[1][part]


def moved(images: np.ndarray, config: ConstraintsConfig, generator: np.random.Generator, parts="both") -> np.ndarray:
    """Images turned and shifted by amounts drawn at random."""
    radians = math.radians(config.angle)
    angles = generator.uniform(-radians, radians, size=len(images)).astype("float32")
    shifts = generator.uniform(-config.shift, config.shift, size=(len(images), 2)).astype("float32")
    if parts in ("both", "rotation"):
        images = tangents.Rotation().transform(images, angles)
    if parts in ("both", "shift"):
        images = tangents.Translation().transform(images, shifts)
    return ops.convert_to_numpy(images)


def compiled(config: ConstraintsConfig, dataset: data.Dataset, enforcement: Any, steps: int, seed: int):
    """A network that is ready for so many steps, with its constraint, if any."""
    keras.utils.set_random_seed(seed)
    model = jvpreg.JacobianModel(models.build(config.model, dataset), seed=seed)
    constraints = [] if enforcement is None else [Invariant(fields(), enforcement=enforcement)]
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(config.learning_rate, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jacobian_regularizers=constraints,
    )
    return model


def trained(config, dataset: data.Dataset, enforcement: Any, augment: bool, steps: int, seed: int):
    """A trained model, and the seconds that it took."""
    model = compiled(config, dataset, enforcement, steps, seed)
    start = time.perf_counter()
    model.fit(Batches(dataset.train, config, augment, steps, seed), shuffle=False, verbose=0)
    return model, time.perf_counter() - start


def accuracies(model: keras.Model, test: data.Split, config: ConstraintsConfig) -> dict[str, float]:
    """Of test images as they are and as they are moved, in %, and how the logits move along the tangents."""
    chosen = test.take(slice(EXAMPLES))
    images = chosen.images()
    versions = {"clean": images}
    for number, (name, parts) in enumerate([("rotated", "rotation"), ("shifted", "shift"), ("both", "both")]):
        versions[name] = moved(images, config, np.random.default_rng(number), parts)
    predicted = {name: model.predict(version, verbose=0, batch_size=250) for name, version in versions.items()}
    correct = {name: float(100 * np.mean(logits.argmax(1) == chosen.labels)) for name, logits in predicted.items()}
    return {**correct, "violation_mean": verify(model, Invariant(fields()), images[:250]).mean}
