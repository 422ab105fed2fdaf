"""The networks that the distillation tests train."""

import keras
import numpy as np
from keras import layers

import jvpreg
from jvpreg.distillation import ActivationMatching, AttentionMatching, BiasJacobianMatching, JacobianMatching
from tests.compare import normal, randomize

LABELS = np.array([0, 2, 1, 1, 0, 2])


def teacher(normalized=True, outputs=3):
    """A teacher with one map of 8x8 positions and one of 4x4."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            layers.Rescaling(0.5, -0.1, name="scaled"),
            layers.Conv2D(4, 3, padding="same", name="first"),
            layers.ReLU(name="relu1"),
            layers.MaxPooling2D(2, name="pool"),
            layers.Conv2D(5, 3, padding="same", use_bias=not normalized, name="second"),
            *([layers.BatchNormalization(name="norm")] if normalized else []),
            layers.ReLU(name="relu2"),
            layers.GlobalAveragePooling2D(name="average"),
            layers.Dense(outputs, name="logits"),
        ]
    )
    return randomize(model, seed=1)


def student(normalized=True, outputs=3):
    """A student that differs from the teacher in its layers, widths, normalization of the input and activation."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            layers.Conv2D(3, 3, padding="same", activation="softplus", name="conv1"),
            layers.Conv2D(6, 3, padding="same", name="conv2"),
            *([layers.BatchNormalization(name="norm2")] if normalized else []),
            layers.Activation("tanh", name="tanh2"),
            layers.AveragePooling2D(2, name="pool2"),
            layers.Conv2D(4, 3, padding="same", name="conv3"),
            layers.Activation("tanh", name="tanh3"),
            layers.Flatten(name="flatten"),
            layers.Dense(outputs, name="last"),
        ]
    )
    return randomize(model, seed=2)


def batch(size=6):
    return normal(size, 8, 8, 2, seed=3).astype(keras.config.floatx()), LABELS[:size]


def all_losses(target="label", pairs=(("first", "conv2"), ("norm", "conv3")), maps=(("relu1", "tanh2"),)):
    return [
        ActivationMatching(0.5),
        ActivationMatching(0.25, temperature=2.0, name="softened"),
        JacobianMatching(0.3, target=target),
        JacobianMatching(0.02, num_probes=2, name="probed"),
        BiasJacobianMatching(0.7, layers=list(pairs), target=target),
        AttentionMatching(0.01, layers=list(maps)),
        AttentionMatching(2.0, layers=list(maps), normalized=True, name="normalized"),
    ]


def compiled(distiller, optimizer=0.0, **kwargs):
    """Compile with an optimizer, or SGD of a learning rate; the default rate of 0 leaves the weights as they are."""
    distiller.compile(
        keras.optimizers.SGD(optimizer) if isinstance(optimizer, float) else optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **kwargs,
    )
    return distiller


def distill(losses, optimizer=0.0, networks=None, **kwargs):
    """A compiled distiller."""
    pair = networks or (teacher(), student())
    return compiled(jvpreg.JacobianDistiller(*pair, losses, seed=5), optimizer, **kwargs)


def evaluated(distiller, x, y, **kwargs):
    return distiller.evaluate(x, y, verbose=0, return_dict=True, batch_size=len(x), **kwargs)


def step(distiller, x, y, **kwargs):
    """The logs of one training step, alone."""
    distiller.reset_metrics()
    return distiller.train_on_batch(x, y, return_dict=True, **kwargs)
