"""The code of docs/many-devices.md. The loop for Torch, as it is printed: two processes train to the weights of one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import jvpreg
from tests.pages import DOCS, ROOT, blocks


def code_with(word: str) -> str:
    (code,) = [code for code, _ in blocks(DOCS / "many-devices.md") if word in code]
    return code


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def weights_of(count: int, script: Path) -> list[np.ndarray]:
    path, port = script.parent / f"{count}.npz", free_port()
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, script, path],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
    return list(np.load(path).values())


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="it is Torch's own way")
def test_two_processes_train_to_the_weights_of_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(code_with("DistributedDataParallel("))
    one, two = weights_of(1, script), weights_of(2, script)
    assert len(one) == 4
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


def values(word: str) -> dict:
    """What the code of the page makes, of a small network."""
    namespace = {"jvpreg": jvpreg, "keras": keras, "x": np.ones((8, 3), "float32"), "y": np.ones((8, 1), "float32")}
    namespace["build"] = lambda: keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        namespace["tf"] = tf
    exec(compile(code_with(word), word, "exec"), namespace)
    return namespace


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="it is TensorFlow's own way")
def test_the_code_for_tensorflow(monkeypatch):
    """Of one device: tests/test_distribution.py has several, in a process of its own, and compares them with one."""
    import tensorflow as tf

    monkeypatch.setattr(tf.distribute, "MirroredStrategy", tf.distribute.get_strategy)
    assert set(values("MirroredStrategy()")["model"].history.history) == {"loss", "frobenius_norm_squared"}


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="it is JAX' own way")
def test_the_code_for_jax():
    try:
        model = values("DataParallel()")["model"]
        assert isinstance(keras.distribution.distribution(), keras.distribution.DataParallel)
        assert model.predict(np.ones((8, 3)), verbose=0).shape == (8, 1)
    finally:
        keras.distribution.set_distribution(None)
