"""The curve of the label's probability while the most salient pixels are removed is that of quantus, on Torch."""

import keras
import numpy as np
import pytest
from compare import assert_close, randomize
from keras import layers

quantus = pytest.importorskip("quantus")
torch = pytest.importorskip("torch")
if keras.backend.backend() != "torch":
    pytest.skip("quantus judges models of Torch here", allow_module_level=True)

SIZE = 6


class ChannelsFirst(torch.nn.Module):
    """A Keras model of images with channels last, as quantus calls it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.permute(0, 2, 3, 1), training=False)


@pytest.mark.parametrize("kind", ["remove", "keep"])
def test_curves(kind):
    from experiments.saliency.study import disturbed, label_probabilities

    x = keras.Input((SIZE, SIZE, 1))
    y = layers.Conv2D(4, 3, activation="gelu")(x)
    model = randomize(keras.Model(x, layers.Dense(3)(layers.Flatten()(y))))
    drawn = np.random.default_rng(0)
    images = drawn.uniform(0, 1, (5, SIZE, SIZE, 1)).astype("float32")
    maps, labels = drawn.uniform(0, 1, (5, SIZE, SIZE)), np.arange(5) % 3
    # To keep the most salient pixels is to remove the least salient ones, from the other end.
    counts = SIZE * np.arange(1, SIZE + 1)
    fractions = (counts if kind == "remove" else SIZE**2 - counts) / SIZE**2
    color = np.zeros(1)
    ours = [label_probabilities(model, disturbed(images, maps, f, kind, color), labels) for f in fractions]
    metric = quantus.PixelFlipping(
        features_in_step=SIZE, perturb_baseline=0.0, normalise=False, disable_warnings=True, display_progressbar=False
    )
    theirs = metric(
        model=ChannelsFirst(model).eval(),
        x_batch=np.moveaxis(images, -1, 1),
        y_batch=labels,
        a_batch=(maps if kind == "remove" else 1.0 - maps)[:, None],
        device="cpu",
        softmax=True,
    )
    assert_close(np.array(ours).T, np.array(theirs), 1e-6)  # quantus computes in float32
