"""The images: decoded once, kept in memory as small integers, and served in seeded batches on any backend."""

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Iterator

import keras
import numpy as np

from experiments import network
from experiments.config import DataConfig
from experiments.errors import ExperimentError

SPLIT_SEED = 0  # a constant: runs with other seeds share their examples
DECODE_BATCH = 1000  # examples


@dataclasses.dataclass(frozen=True)
class Split:
    """Labelled images.

    Attributes:
        pixels: `(N, H, W, C)`, unsigned integers from 0 to `white`.
        labels: `(N,)`, int32.
        white: the integer that stands for 1.0.
    """

    pixels: np.ndarray
    labels: np.ndarray
    white: int

    def __len__(self) -> int:
        return len(self.labels)

    def images(self) -> np.ndarray:
        """All images as float32 in [0, 1], `(N, H, W, C)`."""
        return unit_range(self.pixels, self.white)

    def parts(self, size: int) -> "Iterator[Split]":
        """So many examples after the other; the last part may have fewer."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    def take(self, chosen: slice | np.ndarray) -> "Split":
        """The examples in a slice or at indices `(n,)`."""
        return Split(self.pixels[chosen], self.labels[chosen], self.white)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A train and a test split, and the number of their classes."""

    name: str
    train: Split
    test: Split
    num_classes: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        height, width, channels = self.train.pixels.shape[1:]
        return height, width, channels


def load(config: DataConfig) -> Dataset:
    """Load a data set into memory.

    Raises:
        ExperimentError: the images are not prepared and cannot be loaded, or are too few.
    """
    dataset = _digits() if config.name == "digits" else _tensorflow_dataset(config.name)
    if config.train_examples is None:
        return dataset
    return balanced_subset(dataset, config.train_examples)


def balanced_subset(dataset: Dataset, examples: int) -> Dataset:
    """The data set with this many training examples, equally many of each class, up to one; always the same ones.

    Raises:
        ExperimentError: there are fewer examples, or fewer are asked for than there are classes.
    """
    available, classes = len(dataset.train), dataset.num_classes
    if not classes <= examples <= available:
        raise ExperimentError(
            f"data.train_examples must lie between {classes}, one for each class, and {available}, "
            f"all of {dataset.name}. Received: {examples}."
        )
    # The n-th example of each class, for n = 0, 1, ...: balanced for every number of examples.
    order = np.random.default_rng(SPLIT_SEED).permutation(available)
    rank = np.zeros(available, dtype=np.int64)
    for label in range(classes):
        members = order[dataset.train.labels[order] == label]
        rank[members] = np.arange(len(members))
    return dataclasses.replace(
        dataset, train=dataset.train.take(order[np.argsort(rank[order], kind="stable")[:examples]])
    )


def unit_range(pixels: np.ndarray, white: int) -> np.ndarray:
    """Integers from 0 to `white`, of any shape, as float32 in [0, 1]."""
    return np.divide(pixels, white, dtype=np.float32)


def channel_moments(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the variance of each channel in units of [0, 1], both `(C,)`.

    From the histogram of the integers: exact, and without a float copy of all images.
    """
    levels = np.arange(split.white + 1) / split.white
    channels = np.moveaxis(split.pixels, -1, 0)
    counts = np.stack([np.bincount(channel.ravel(), minlength=len(levels)) for channel in channels])
    weights = counts / counts.sum(axis=1, keepdims=True)
    mean = weights @ levels
    return mean, weights @ levels**2 - mean**2


class Batches(keras.utils.PyDataset):
    """Shuffled and, if wanted, augmented training batches: a pure function of seed, epoch and index.

    So a resumed run sees the batches that the uninterrupted one would have seen, if `start_epoch` is called when an
    epoch begins, as the callback of `order_epochs` does.

    Args:
        split: the training examples.
        batch_size: examples in each batch; the last batch of an epoch may be smaller.
        seed: of the order and of the augmentation.
        augment: whether to shift and flip.
        part: the numbers of the examples of each batch that belong here: each of several hosts has its own.
    """

    def __init__(self, split: Split, batch_size: int, seed: int, augment: bool, part: Callable[[int], slice] = slice):
        super().__init__()
        self.split, self.batch_size, self.seed, self.augment = split, batch_size, seed, augment
        self.part = part
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Draw the order of an epoch, which counts from 0."""
        self.epoch = epoch
        self.order = np.random.default_rng((self.seed, epoch)).permutation(len(self.split))

    def order_epochs(self) -> keras.callbacks.Callback:
        """The callback that starts each epoch; it goes with `shuffle=False`."""
        return keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: self.start_epoch(epoch))

    def __len__(self) -> int:
        return math.ceil(len(self.split) / self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Batch `index` of the epoch: images `(B, H, W, C)` in [0, 1] and labels `(B,)`."""
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        pixels = self.split.pixels[chosen]
        if self.augment:
            pixels = shift_and_flip(pixels, np.random.default_rng((self.seed, self.epoch, index)))
        part = self.part(len(chosen))
        return unit_range(pixels[part], self.split.white), self.split.labels[chosen][part]


def training_batches(
    dataset: Dataset, batch_size: int, seed: int, augment: bool, part: Callable[[int], slice] = slice
) -> Batches:
    """The training batches of a data set. Digits are never augmented, since a mirrored 2 is not a 5."""
    return Batches(dataset.train, batch_size, seed, augment and dataset.name != "digits", part)


def shift_and_flip(pixels: np.ndarray, generator: np.random.Generator, padding: int = 4) -> np.ndarray:
    """Crop each image at random from its zero-padded self, and mirror half of them.

    Args:
        pixels: `(B, H, W, C)`.
        generator: the source of the random draws.
        padding: the largest shift, in pixels.

    Returns:
        The new images, of the same shape and dtype.
    """
    batch, height, width, _ = pixels.shape
    padded = np.pad(pixels, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    tops, lefts = generator.integers(0, 2 * padding + 1, size=(2, batch, 1))
    rows = tops + np.arange(height)
    columns = lefts + np.arange(width)
    mirrored = generator.random(batch) < 0.5
    columns[mirrored] = columns[mirrored, ::-1]
    return padded[np.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _digits() -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels, labels = digits.images[..., None].astype(np.uint8), digits.target.astype(np.int32)
    parts = train_test_split(pixels, labels, test_size=0.2, stratify=labels, random_state=SPLIT_SEED)
    return Dataset("digits", Split(parts[0], parts[2], white=16), Split(parts[1], parts[3], white=16), 10)


def _tensorflow_dataset(name: str) -> Dataset:
    import tensorflow_datasets as tfds

    if importlib.util.find_spec("tensorflow") is None:
        raise ExperimentError(
            f"--data.name={name}: tensorflow-datasets reads its files with TensorFlow, which is not installed here; "
            "it is needed on every backend. Run `pip install tensorflow`, or try --data.name=digits."
        )
    builder = tfds.builder(name)
    if not builder.is_prepared():
        _require_connection(name, builder.info.homepage, builder.data_path)
        builder.download_and_prepare()

    def decoded(part: str) -> Split:
        batches = list(tfds.as_numpy(builder.as_dataset(split=part, batch_size=DECODE_BATCH)))
        pixels = np.concatenate([batch["image"] for batch in batches])
        labels = np.concatenate([batch["label"] for batch in batches])
        return Split(pixels, labels.astype(np.int32), white=255)

    return Dataset(name, decoded("train"), decoded("test"), builder.info.features["label"].num_classes)


def _require_connection(name: str, address: str, folder: object) -> None:
    # tensorflow-datasets would try for more than three minutes before it reports that there is no network.
    if failure := network.failure(address):
        raise ExperimentError(
            f"The data set {name!r} is not in {folder}, and {address} cannot be reached ({failure}). "
            "Connect to the network for the first run, or set TFDS_DATA_DIR to a folder where "
            "tensorflow-datasets has prepared it, or try --data.name=digits, which needs no download."
        )
