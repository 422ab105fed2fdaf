"""Several devices of one machine: `--devices=N`, and `--layout` where a model is split over them too."""

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any

import keras

from experiments.config import TrainConfig
from experiments.data import Dataset
from experiments.errors import ExperimentError

BATCH, MODEL = "batch", "model"
"""The axes of a mesh: `DataParallel` has the first one, a layout splits variables along the second."""


@contextlib.contextmanager
def used(config: TrainConfig) -> Iterator[None]:
    """A context in which what is built is built on the devices of a configuration. It is entered before all else.

    Raises:
        ExperimentError: the machine has not so many devices.
    """
    if config.devices == 1:
        yield
    elif keras.backend.backend() == "tensorflow":
        with _mirrored(config.devices).scope():
            yield
    else:
        keras.distribution.set_distribution(_distribution(config))
        try:
            yield
        finally:
            keras.distribution.set_distribution(None)


def check(config: TrainConfig) -> None:
    """Raises an ExperimentError where the keys do not fit each other or the backend."""
    backend = keras.backend.backend()
    if config.layout is not None:
        _check_layout(config, backend)
    if config.devices == 1:
        return
    if backend == "torch":
        raise ExperimentError(
            f"--devices={config.devices}: Keras trains on one device on Torch. Use KERAS_BACKEND=tensorflow or jax, or "
            "a loop of your own with DistributedDataParallel, as docs/many-devices.md has it."
        )
    examples = {"batch_size": config.batch_size, "probe.examples": config.probe.examples}
    for key, count in examples.items():
        if config.layout is None and count % config.devices:
            raise ExperimentError(
                f"--{key}={count} cannot be divided by --devices={config.devices}. Expected a multiple of it."
            )


def check_dataset(config: TrainConfig, dataset: Dataset) -> None:
    """Raises an ExperimentError where the last batch cannot be shared: JAX divides no batch unevenly."""
    if config.devices == 1 or config.layout is not None or keras.backend.backend() != "jax":
        return
    count = len(dataset.train)
    if count % config.devices:
        raise ExperimentError(
            f"--devices={config.devices}: JAX cannot share the last of {count} training images among them. Expected "
            f"--data.train_examples={count - count % config.devices}, or fewer devices."
        )
    if len(dataset.test) % config.devices:
        raise ExperimentError(
            f"--devices={config.devices}: JAX cannot share the last of {len(dataset.test)} test images among them. "
            "Expected a number of devices that divides it."
        )


def _check_layout(config: TrainConfig, backend: str) -> None:
    if backend != "jax" or config.devices == 1:
        raise ExperimentError(
            "--layout splits a model over devices, which takes KERAS_BACKEND=jax and --devices=N, 2 or more. "
            f"Received: the backend {backend!r} and --devices={config.devices}."
        )
    for pattern, axes in (config.layout or {}).items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ExperimentError(f"--layout: {pattern!r} is no regular expression ({error}).") from error
        if wrong := [axis for axis in axes if axis not in (None, MODEL)]:
            raise ExperimentError(f'--layout: the axes of {pattern!r} are null or "{MODEL}". Received: {wrong[0]!r}.')


@functools.cache
def _mirrored(count: int):
    """A MirroredStrategy over GPUs, or where there are none over logical devices of the CPU.

    One for all runs of a process: TensorFlow takes the reductions of a second one for those of the first.
    """
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        _check_there_are(len(gpus), count, "GPU")
        return tf.distribute.MirroredStrategy([f"GPU:{i}" for i in range(count)])
    cpu = tf.config.list_physical_devices("CPU")[0]
    # TensorFlow has started where something has run before: it then keeps the devices that it has.
    with contextlib.suppress(RuntimeError):
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    _check_there_are(len(tf.config.list_logical_devices("CPU")), count, "CPU")
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(count)])


def _distribution(config: TrainConfig) -> Any:
    """Of JAX: the batch over all devices; with a layout the variables that it names, and the batch stays whole."""
    import jax

    # JAX has started where something has run before: it then keeps the devices that it has.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", config.devices)
    found = keras.distribution.list_devices()
    _check_there_are(len(found), config.devices, found[0].split(":")[0].upper())
    devices = found[: config.devices]
    if config.layout is None:
        return keras.distribution.DataParallel(devices=devices)
    mesh = keras.distribution.DeviceMesh((1, config.devices), (BATCH, MODEL), devices)
    layout = keras.distribution.LayoutMap(mesh)
    for pattern, axes in config.layout.items():
        layout[pattern] = keras.distribution.TensorLayout(tuple(axes))
    return keras.distribution.ModelParallel(layout_map=layout, batch_dim_name=BATCH)


def _check_there_are(found: int, wanted: int, kind: str) -> None:
    if found < wanted:
        raise ExperimentError(
            f"--devices={wanted}: this process has {found} {kind} devices. Expected as many; on CPU, let `train` be "
            "the first to run in its process."
        )
