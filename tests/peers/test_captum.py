"""Saliency maps are those of captum, on Torch."""

import keras
import numpy as np
import pytest
from compare import assert_close, normal, randomize
from keras import layers

from jvpreg.attribution import saliency

attr = pytest.importorskip("captum.attr")
torch = pytest.importorskip("torch")
if keras.backend.backend() != "torch":
    pytest.skip("captum explains models of Torch", allow_module_level=True)

LABELS = np.array([0, 2, 1, 2])


@pytest.fixture
def model(float64):
    x = keras.Input((6, 6, 2))
    y = layers.Conv2D(4, 3, activation="gelu")(x)
    y = layers.MaxPooling2D(2)(layers.BatchNormalization()(y))
    return randomize(keras.Model(x, layers.Dense(3)(layers.Flatten()(y))))


@pytest.mark.parametrize(
    ("ours", "theirs", "tolerance"),
    [
        (saliency.input_gradient, lambda f, x, y: attr.Saliency(f).attribute(x, y, abs=False), 1e-12),
        (saliency.gradient_times_input, lambda f, x, y: attr.InputXGradient(f).attribute(x, y), 1e-12),
        *(
            (
                lambda *given, method=method, **more: saliency.integrated_gradients(
                    *given, num_steps=16, method=method, baseline=0.25, **more
                ),
                lambda f, x, y, method=method: attr.IntegratedGradients(f).attribute(
                    x, baselines=0.25, target=y, n_steps=16, method=method
                ),
                tolerance,
            )
            # captum rounds the weights of the points to float32, in which those of the midpoints are exact.
            for method, tolerance in (("gausslegendre", 1e-7), ("riemann_middle", 1e-12))
        ),
    ],
    ids=["gradient", "gradient times input", "integrated, Gauss-Legendre", "integrated, midpoints"],
)
def test_maps(model, ours, theirs, tolerance):
    x = normal(4, 6, 6, 2)
    given = torch.tensor(x, requires_grad=True)
    expected = theirs(lambda x: model(x, training=False), given, torch.tensor(LABELS)).detach().numpy()
    assert_close(ours(model, x, LABELS, reduce=None), expected, tolerance)
