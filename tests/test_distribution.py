"""Two devices give the loss and the penalties of one. Each case runs in a process whose devices are made of the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

COMMON = """
import keras, numpy as np
from keras import layers, ops
import jvpreg
from jvpreg.regularizers import JacobianRegularizer

class AlongOnes(JacobianRegularizer):
    def directions(self, inputs, labels, seed):
        return ops.expand_dims(ops.ones_like(inputs), 0)
    def penalty(self, seen):
        return ops.sum(seen.jvp[0] ** 2, axis=-1)

x = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")
y = np.random.default_rng(1).normal(size=(16, 3)).astype("float32")

def train(**kwargs):
    keras.utils.set_random_seed(1)
    base = keras.Sequential([keras.Input((6,)), layers.Dense(5, activation="tanh"), layers.Dense(3)])
    model = jvpreg.JacobianModel(base, seed=1)
    model.compile(keras.optimizers.SGD(0.1), "mse", jacobian_regularizers=[AlongOnes(0.3)], **kwargs)
    history = model.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False, validation_data=(x, y)).history
    return history, base.get_weights()

def compare(one, two):
    assert set(one[0]) == set(two[0]) == {"loss", "along_ones", "val_loss", "val_along_ones"}, (one[0], two[0])
    for key, values in one[0].items():
        np.testing.assert_allclose(two[0][key], values, rtol=1e-5, err_msg=key)
    for a, b in zip(one[1], two[1], strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)
"""

MIRRORED = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
"""

MIRRORED_TRAINING = """
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
single = train(jacobian_interval=2)
with strategy.scope():
    several = train(jacobian_interval=2)
compare(single, several)

with strategy.scope():
    base = keras.Sequential([keras.Input((6,)), layers.Dense(5, activation="tanh"), layers.Dense(3)])
    model = jvpreg.JacobianModel(base)
    model.compile(keras.optimizers.SGD(0.0), "mse", jacobian_regularizers=[jvpreg.regularizers.SpectralNorm(0.1)])
norms = model.fit(x, y, batch_size=8, epochs=20, verbose=0, shuffle=False).history["spectral_norm"]
exact = np.linalg.svd(ops.convert_to_numpy(jvpreg.jacobian(base, x)), compute_uv=False)[:, 0] ** 2
assert norms[0] < norms[-1] < 1.001 * exact.mean(), (norms, exact.mean())
assert norms[-1] > 0.8 * exact.mean(), (norms, exact.mean())

class Exploding(AlongOnes):
    def penalty(self, seen):
        return ops.exp(seen.inputs[:, 0]) + 0 * seen.jvp[0, :, 0]

x[:, 0] = np.where(np.arange(16) >= 8, 1000.0, 0.0)
with strategy.scope():
    model = jvpreg.JacobianModel(keras.Sequential([keras.Input((6,)), layers.Dense(3)]))
    model.compile("sgd", "mse", jacobian_regularizers=[Exploding(0.1)])
try:
    model.fit(x, y, batch_size=8, verbose=0, shuffle=False)
except FloatingPointError as error:
    assert "at training step 2 " in str(error), error
else:
    raise AssertionError("nothing was raised")
"""

DATA_PARALLEL = """
import jax
assert len(jax.devices()) == 2
single = train(jacobian_interval=2)
keras.distribution.set_distribution(keras.distribution.DataParallel())
several = train(jacobian_interval=2)
compare(single, several)
# A part of a batch that lies on two devices: which examples it is, is left to chance.
assert np.isfinite(train(jacobian_fraction=0.5)[0]["along_ones"]).all()
"""


def _run(program: str, **environment):
    root = str(Path(__file__).parent.parent)
    finished = subprocess.run(
        [sys.executable, "-c", program + "\nprint('done')"],
        env={**os.environ, **environment, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.strip().endswith("done")


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.distribute is TensorFlow's")
def test_mirrored_strategy():
    _run(MIRRORED + COMMON + MIRRORED_TRAINING)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="keras.distribution is JAX's")
def test_data_parallel():
    _run(COMMON + DATA_PARALLEL, XLA_FLAGS="--xla_force_host_platform_device_count=2")
