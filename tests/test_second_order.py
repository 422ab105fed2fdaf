"""The gradient of a penalty through a normalization: ours is right where TensorFlow's autodiff is silently wrong.

Within the variance, `tf.nn.moments` takes the mean for a constant. This is exact to first order and wrong to second.
"""

import keras
import numpy as np
import pytest
from compare import normal, numpy, randomize
from keras import layers, ops

import jvpreg

pytestmark = [
    pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="about TensorFlow's moments"),
    pytest.mark.usefixtures("float64"),
]


def penalty_by_engine(model, x, u, **options):
    return ops.sum(ops.square(jvpreg.linearize(model, x, **options).jvp(u)))


def gradient(model, penalty):
    """The gradient of `penalty` by the kernel of the first layer, from a tape."""
    import tensorflow as tf

    with tf.GradientTape() as tape:
        value = penalty()
    return tape.gradient(value, model.layers[0].kernel.value).numpy()


def difference(model, penalty, direction, step=1e-5):
    kernel = model.layers[0].kernel
    start = numpy(kernel).copy()
    values = []
    for sign in (1, -1):
        kernel.assign(start + sign * step * direction)
        values.append(float(penalty()))
    kernel.assign(start)
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize(
    ("normalization", "training"),
    [
        (lambda: layers.LayerNormalization(), False),
        (lambda: layers.GroupNormalization(1), False),
        (lambda: layers.BatchNormalization(), True),
    ],
    ids=["LayerNormalization", "GroupNormalization", "BatchNormalization"],
)
def test_weight_gradient_through_a_normalization(normalization, training):
    import tensorflow as tf

    model = randomize(keras.Sequential([keras.Input((3,)), layers.Dense(4), normalization(), layers.Dense(2)]))
    x, u, direction = tf.constant(normal(5, 3)), tf.constant(normal(5, 3, seed=1)), normal(3, 4, seed=2)
    options = {"training": training, "batch_statistics": "coupled" if training else None}

    def by_autodiff():
        with tf.autodiff.ForwardAccumulator(x, u) as accumulator:
            y = model(x, training=training)
        return tf.reduce_sum(accumulator.jvp(y) ** 2)

    def by_engine():
        return penalty_by_engine(model, x, u, **options)

    # Both penalties agree, and so do their finite differences. Only our gradient agrees with the differences.
    np.testing.assert_allclose(float(by_engine()), float(by_autodiff()), rtol=1e-10)
    expected = difference(model, by_engine, direction)
    np.testing.assert_allclose(difference(model, by_autodiff, direction), expected, rtol=1e-6)
    ours, theirs = (np.sum(gradient(model, penalty) * direction) for penalty in (by_engine, by_autodiff))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    assert abs(theirs - expected) > 1e-2 * abs(expected)
