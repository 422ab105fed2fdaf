"""FGSM and PGD are those of foolbox, on Torch."""

import keras
import numpy as np
import pytest
from compare import assert_close, randomize
from keras import layers

from experiments import robustness

foolbox = pytest.importorskip("foolbox")
torch = pytest.importorskip("torch")
if keras.backend.backend() != "torch":
    pytest.skip("foolbox attacks models of Torch", allow_module_level=True)

# Exact in float32, in which the attacks keep them.
RADIUS, STEP = 2.0**-4, 2.0**-6


class Logits(torch.nn.Module):
    """A Keras model in inference, which foolbox takes for one of Torch."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x, training=False)


class NoStart:
    """Stands for a generator: the attack starts at the image itself."""

    def uniform(self, low, high, shape):
        return np.zeros(shape)


@pytest.fixture
def attacked(float64):
    x = keras.Input((6, 6, 2))
    y = layers.Conv2D(4, 3, activation="gelu")(x)
    model = randomize(keras.Model(x, layers.Dense(3)(layers.Flatten()(layers.BatchNormalization()(y)))))
    images = np.random.default_rng(0).uniform(0, 1, (5, 6, 6, 2))
    labels = np.arange(5) % 3
    return model, images, labels


def theirs(attack, model, images, labels):
    subject = foolbox.PyTorchModel(Logits(model).eval(), bounds=(0, 1), device="cpu")
    criterion = foolbox.criteria.Misclassification(torch.tensor(labels))
    return attack.run(subject, torch.tensor(images), criterion, epsilon=RADIUS).numpy()


def test_fgsm(attacked):
    model, images, labels = attacked
    ours = robustness.fgsm(images, labels, gradient=robustness.LossGradient(model), epsilon=RADIUS)
    attack = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    assert_close(ours, theirs(attack, model, images, labels), 1e-12)


def test_pgd(attacked):
    model, images, labels = attacked
    gradient, start = robustness.LossGradient(model), NoStart()
    ours = robustness.pgd(images, labels, gradient=gradient, epsilon=RADIUS, steps=7, step_size=STEP, generator=start)
    attack = foolbox.attacks.LinfProjectedGradientDescentAttack(steps=7, abs_stepsize=STEP, random_start=False)
    assert_close(ours, theirs(attack, model, images, labels), 1e-12)
