"""The architectures are what their names say."""

from itertools import pairwise

import keras
import numpy as np
import pytest

from experiments import data, models
from experiments.config import DataConfig, ModelConfig


def images_like(shape, classes=10):
    generator = np.random.default_rng(0)
    split = data.Split(
        generator.integers(0, 256, (20, *shape), np.uint8), generator.integers(0, classes, 20, np.int32), 255
    )
    return data.Dataset("random", split, split, classes)


@pytest.mark.parametrize(
    ("name", "convolutions"),
    [("linear", 0), ("mlp", 0), ("vgg4", 4), ("vgg6", 6), ("vgg9", 9), ("vgg11", 11), ("resnet20", 19)],
)
@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3)])
def test_layers_and_logits(name, convolutions, shape):
    model = models.build(ModelConfig(name=name, width=4), images_like(shape, classes=7))
    assert model.input_shape == (None, *shape)
    assert model.output_shape == (None, 7)
    names = [layer.name for layer in model.layers]
    assert [name for name in names if name.startswith("conv")] == [f"conv{n + 1}" for n in range(convolutions)]
    assert isinstance(model.layers[-1], keras.layers.Dense)
    assert model.layers[-1].activation is keras.activations.linear
    assert sum(isinstance(layer, keras.layers.Dense) for layer in model.layers) == (3 if name == "mlp" else 1)


def test_known_sizes():
    cifar = images_like((32, 32, 3))
    trainable = {
        name: sum(
            int(np.prod(weight.shape)) for weight in models.build(ModelConfig(name, width), cifar).trainable_weights
        )
        for name, width in (("linear", 1), ("resnet20", 16), ("vgg4", 64))
    }
    assert trainable["linear"] == 3072 * 10 + 10
    assert trainable["resnet20"] == 272_474  # 0.27 million, with projections where the width changes
    channels = [3, 64, 128, 256, 512]
    kernels = sum(9 * inner * outer for inner, outer in pairwise(channels))
    assert trainable["vgg4"] == kernels + 2 * sum(channels[1:]) + 512 * 10 + 10


def test_stages_double_in_width_up_to_eight_times():
    model = models.build(ModelConfig("vgg9", 16), images_like((32, 32, 3)))
    widths = [layer.filters for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    assert widths == [16, 32, 64, 64, 128, 128, 128, 128, 128]


def test_the_input_is_normalized_inside_and_survives_saving(tmp_path):
    dataset = data.load(DataConfig())
    model = models.build(ModelConfig("vgg4", 4), dataset)
    images = dataset.train.images()
    normalized = keras.ops.convert_to_numpy(model.get_layer("normalization")(images))
    assert normalized.mean() == pytest.approx(0.0, abs=1e-4)
    assert normalized.std() == pytest.approx(1.0, abs=1e-4)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(images[:9], verbose=0), model.predict(images[:9], verbose=0))


@pytest.mark.parametrize("name", ["mlp", "vgg4", "resnet20"])
def test_dropout_stands_before_the_head(name):
    model = models.build(ModelConfig(name, 4, dropout=0.25), images_like((8, 8, 1)))
    layer = model.get_layer("dropout")
    assert layer.rate == 0.25
    following = model.layers[model.layers.index(layer) + 1 :]
    assert [type(after).__name__ for after in following] == (["GlobalAveragePooling2D"] if name != "mlp" else []) + [
        "Dense"
    ]
