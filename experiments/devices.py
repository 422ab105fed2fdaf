"""Several devices: `--devices=N`, also of several hosts, and `--layout` to split a model over them."""

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any

import keras

from experiments.config import HostsConfig, TrainConfig
from experiments.data import Dataset
from experiments.errors import ExperimentError

BATCH, MODEL = "batch", "model"
"""The axes of a mesh: `DataParallel` has only the first, a layout splits variables along the second."""


@contextlib.contextmanager
def used(config: TrainConfig) -> Iterator[None]:
    """A context in which models are built on the devices of a configuration. Enter it before anything else.

    Raises:
        ExperimentError: the machine has fewer devices.
    """
    if config.devices * config.hosts.count == 1:
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


@contextlib.contextmanager
def undistributed() -> Iterator[None]:
    """A context in which variables belong to this host alone: Keras makes some when it first saves a model."""
    distribution = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(distribution)


def check(config: TrainConfig) -> None:
    """Raises an ExperimentError if the keys do not fit each other or the backend."""
    backend = keras.backend.backend()
    _check_hosts(config.hosts, backend)
    if config.layout is not None:
        _check_layout(config, backend)
    count = config.devices * config.hosts.count
    if count == 1:
        return
    if backend == "torch":
        raise ExperimentError(
            f"--devices={config.devices}: Keras trains on one device on Torch. Use KERAS_BACKEND=tensorflow or jax, or "
            "a loop of your own with DistributedDataParallel, as docs/many-devices.md has it."
        )
    examples = {"batch_size": config.batch_size, "probe.examples": config.probe.examples}
    for key, size in examples.items():
        if config.layout is None and size % count:
            raise ExperimentError(f"--{key}={size} cannot be divided by {_named(config)}. Expected a multiple of it.")


def check_dataset(config: TrainConfig, dataset: Dataset) -> None:
    """Raises an ExperimentError if the last batch cannot be shared: JAX does not divide a batch unevenly."""
    devices = config.devices * config.hosts.count
    if devices == 1 or config.layout is not None or keras.backend.backend() != "jax":
        return
    count = len(dataset.train)
    if count % devices:
        raise ExperimentError(
            f"{_named(config)}: JAX cannot share the last of {count} training images among them. Expected "
            f"--data.train_examples={count - count % devices}, or fewer devices."
        )
    if len(dataset.test) % devices:
        raise ExperimentError(
            f"{_named(config)}: JAX cannot share the last of {len(dataset.test)} test images among them. "
            "Expected a number of devices that divides it."
        )


def check_one_host(config: TrainConfig, study: str) -> None:
    """Raises an ExperimentError if a study other than `train` is to train on several hosts together."""
    if config.hosts != HostsConfig():
        raise ExperimentError(
            f"--train.hosts: `{study}` trains each model on one host; `train` alone takes several. Received: "
            f"--train.hosts.count={config.hosts.count}."
        )


def check_one_device(config: TrainConfig, study: str) -> None:
    """Raises an ExperimentError if a study that trains on one device is to use several."""
    check_one_host(config, study)
    if config.devices > 1 or config.layout is not None:
        raise ExperimentError(
            f"--train.devices: `{study}` trains on one device. Received: --train.devices={config.devices} and "
            f"--train.layout={config.layout}."
        )


def _named(config: TrainConfig) -> str:
    """The devices, named by the keys of the command."""
    devices = f"--devices={config.devices}"
    return devices if config.hosts.count == 1 else f"--hosts.count={config.hosts.count} times {devices}"


def _check_hosts(hosts: HostsConfig, backend: str) -> None:
    if hosts.count == 1:
        given = {"index": hosts.index or None, "address": hosts.address}
        if found := [f"--hosts.{key}={value}" for key, value in given.items() if value is not None]:
            raise ExperimentError(f"{found[0]} takes several hosts. Expected --hosts.count=N, 2 or more.")
        return
    if backend != "jax":
        raise ExperimentError(
            f"--hosts.count={hosts.count} takes KERAS_BACKEND=jax: Keras trains on one machine on others. Received: "
            f"the backend {backend!r}."
        )
    if hosts.index >= hosts.count:
        raise ExperimentError(f"--hosts.index={hosts.index}: expected 0 to {hosts.count - 1}, one for each host.")
    name, colon, port = (hosts.address or "").rpartition(":")
    if not (name and colon and port.isdigit() and 0 < int(port) < 2**16):
        raise ExperimentError(
            f"--hosts.address={hosts.address}: expected the address of host 0 as HOST:PORT, such as 10.0.0.1:1234."
        )


def _check_layout(config: TrainConfig, backend: str) -> None:
    if config.hosts.count > 1:
        raise ExperimentError(f"--layout splits a model over one host. Received: --hosts.count={config.hosts.count}.")
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
    """A MirroredStrategy over GPUs; if there are none, over logical devices of the CPU.

    All runs of a process share it: TensorFlow takes the reductions of a second strategy for those of the first.
    """
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        _check_there_are(len(gpus), count, "GPU")
        return tf.distribute.MirroredStrategy([f"GPU:{i}" for i in range(count)])
    cpu = tf.config.list_physical_devices("CPU")[0]
    # If TensorFlow has already started, it keeps the devices that it has.
    with contextlib.suppress(RuntimeError):
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    _check_there_are(len(tf.config.list_logical_devices("CPU")), count, "CPU")
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(count)])


def _distribution(config: TrainConfig) -> Any:
    """JAX's distribution: of the batch; with a layout, of the variables that it names, and the batch stays whole."""
    import jax

    # If JAX has already started, it keeps the devices that it has.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", config.devices)
    found = [[f"{one.platform}:{one.id}" for one in jax.local_devices(i)] for i in range(jax.process_count())]
    fewest = min(found, key=len)
    _check_there_are(len(fewest), config.devices, fewest[0].split(":")[0].upper())
    devices = [name for names in found for name in names[: config.devices]]
    if config.layout is None:
        # Each host reads its own part of a batch.
        return keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
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
