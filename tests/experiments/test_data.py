"""Images in [0, 1], the same every time, and a quick plain error where there are none."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import data
from experiments.config import DataConfig
from experiments.errors import ExperimentError
from experiments.run_folder import RunFolder

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def digits():
    return data.load(DataConfig(name="digits"))


def test_digits_are_small_images_in_the_unit_range_with_all_classes_in_both_splits(digits):
    assert digits.image_shape == (8, 8, 1)
    assert len(digits.train) + len(digits.test) == 1797
    for split in (digits.train, digits.test):
        images = split.images()
        assert images.dtype == np.float32
        assert images.min() == 0.0
        assert images.max() == 1.0
        assert np.bincount(split.labels).min() >= 0.09 * len(split)


def test_channel_moments_are_those_of_the_float_images(digits):
    mean, variance = data.channel_moments(digits.train)
    images = digits.train.images().astype(np.float64)
    np.testing.assert_allclose(mean, images.mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(variance, images.var(axis=(0, 1, 2)), rtol=1e-6)


def test_a_subset_is_balanced_fixed_and_nested(digits):
    small, large = (data.load(DataConfig(name="digits", train_examples=n)).train for n in (50, 105))
    assert set(np.bincount(small.labels)) == {5}
    assert set(np.bincount(large.labels)) == {10, 11}
    np.testing.assert_array_equal(large.pixels[:50], small.pixels)


@pytest.mark.parametrize("examples", [3, 100_000])
def test_a_subset_of_an_impossible_size_is_an_error(examples):
    with pytest.raises(ExperimentError, match=rf"data.train_examples must lie between 10.*Received: {examples}"):
        data.load(DataConfig(name="digits", train_examples=examples))


def test_batches_cover_an_epoch_once_and_depend_on_seed_and_epoch_only(digits):
    batches = data.Batches(digits.train, batch_size=100, seed=3, augment=False)
    first = [batches[index] for index in range(len(batches))]
    assert sum(len(labels) for _, labels in first) == len(digits.train)
    summed = sum(images.sum(dtype=np.float64) for images, _ in first)
    assert summed == pytest.approx(digits.train.images().sum(dtype=np.float64))
    batches.start_epoch(1)
    assert not np.array_equal(batches[0][0], first[0][0])
    batches.start_epoch(0)
    np.testing.assert_array_equal(batches[0][0], first[0][0])
    other_seed = data.Batches(digits.train, batch_size=100, seed=4, augment=False)
    assert not np.array_equal(other_seed[0][0], first[0][0])


def test_augmented_batches_are_reproducible(digits):
    one, other = (data.Batches(digits.train, 32, seed=0, augment=True) for _ in range(2))
    np.testing.assert_array_equal(one[5][0], other[5][0])


def test_shifts_and_flips_move_whole_images():
    # A single bright pixel: its new position tells the shift, and whether the image was mirrored.
    images = np.zeros((500, 9, 9, 1), np.uint8)
    images[:, 4, 3] = 200
    moved = data.shift_and_flip(images, np.random.default_rng(0))
    assert moved.shape == images.shape
    assert moved.dtype == np.uint8
    _, rows, columns, _ = np.nonzero(moved)
    assert set(rows) == set(range(9))  # from 4-4 to 4+4
    assert set(columns) == set(range(9))  # from 3-4, which leaves the image, to 3+4, and mirrored
    assert set(moved[moved > 0]) == {200}


def test_no_shift_leaves_an_image_or_its_mirror_image():
    images = np.random.default_rng(0).integers(0, 255, (20, 4, 5, 3), np.uint8)
    moved = data.shift_and_flip(images, np.random.default_rng(1), padding=0)
    mirrored = np.array([np.array_equal(after, before[:, ::-1]) for before, after in zip(images, moved, strict=True)])
    kept = np.array([np.array_equal(after, before) for before, after in zip(images, moved, strict=True)])
    assert (mirrored ^ kept).all()
    assert 0 < mirrored.sum() < 20


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_tensorflow_datasets_are_decoded_into_memory(name, classes, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("tensorflow")
    monkeypatch.setattr(tfds.core.DatasetBuilder, "is_prepared", lambda self: True)
    with tfds.testing.mock_data(num_examples=8):
        dataset = data.load(DataConfig(name=name))
    assert dataset.image_shape == (32, 32, 3)
    assert dataset.num_classes == classes
    assert dataset.train.pixels.dtype == np.uint8
    assert dataset.train.labels.dtype == np.int32
    assert len(dataset.train) == len(dataset.test) == 8


def test_without_tensorflow_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExperimentError, match=r"--data.name=cifar10: .* is not installed here.*pip install tensorflow"):
        data.load(DataConfig(name="cifar10"))


@pytest.mark.slow
def test_without_data_and_network_the_error_comes_in_seconds_and_says_what_to_do(tmp_path):
    pytest.importorskip("tensorflow")
    closed = "http://127.0.0.1:9"  # a proxy that refuses: no network, wherever the test runs
    environment = os.environ | {"TFDS_DATA_DIR": str(tmp_path), "https_proxy": closed, "HTTPS_PROXY": closed}
    start = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-m", "experiments", "train", "--data.name=cifar10", f"--folder={tmp_path / 'run'}"],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    message = run.stderr.splitlines()[-1]
    assert message.startswith("error: The data set 'cifar10' is not in ")
    assert str(tmp_path) in message  # TFDS_DATA_DIR is honoured
    assert "TFDS_DATA_DIR" in message
    assert "--data.name=digits" in message
    assert time.monotonic() - start < 30
    assert not RunFolder(tmp_path / "run").holds_run
