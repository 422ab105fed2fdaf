"""The README's code runs, one block after the other, on models and data small enough for a test."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
import scipy.sparse.linalg
from compare import normal, randomize
from keras import layers

import jvpreg

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.compile(r"^```python\n(.*?)^```\n", re.DOTALL | re.MULTILINE).findall(README.read_text(encoding="utf-8"))


def images_to_logits(depth: int) -> keras.Model:
    """A VGG whose layers have the names that the README speaks of."""
    x = y = keras.Input((8, 8, 3))
    for i in range(1, depth + 1):
        y = layers.Conv2D(3, 3, padding="same", strides=2 if i in (4, 5) else 1, name=f"conv{i}")(y)
        y = layers.BatchNormalization(name=f"norm{i}")(y)
        y = layers.ReLU(name=f"relu{i}")(y)
    return randomize(keras.Model(x, layers.Dense(10, name="dense")(layers.Flatten()(y))))


class OneBatch(keras.utils.PyDataset):
    """Inputs and labels, as a data set of one batch."""

    def __init__(self, *arrays):
        super().__init__()
        self.arrays = arrays

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.arrays


@pytest.fixture
def run(tmp_path):
    """Of Weights & Biases."""
    run = pytest.importorskip("wandb").init(mode="offline", dir=tmp_path)
    yield run
    run.finish()


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a SavedModel is among what it writes")
@pytest.mark.usefixtures("run")
def test_the_code_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, labels = normal(4, 8, 8, 3).astype("float32"), np.arange(4)
    batches = OneBatch(images, labels)
    known = {
        "keras": keras,
        "jvpreg": jvpreg,
        "scipy": scipy,
        "my_keras_model": images_to_logits(3),
        "x": images,
        "x_probe": images,
        "labels": labels,
        "u": images,
        "v": normal(4, 10),
        "U": normal(192, 10),
        "train": batches,
        "test": batches,
        "lin": jvpreg.linearize(images_to_logits(3), images),
    }
    x, y = normal(4, 3), normal(4, 1, seed=1)
    rows = {"x": x, "y": y, "x_test": x, "y_test": y}
    vectors = {"train": OneBatch(normal(4, 8), normal(4, 3))}
    # What a block needs that is not what the others do, by its place.
    others = {4: {"teacher": images_to_logits(5), "student": images_to_logits(7), "y": labels}, 5: rows, 6: vectors}
    for i, code in enumerate(BLOCKS):
        code = code.replace("epochs=10,", "epochs=1,")
        exec(compile(code, f"{README.name}, block {i}", "exec"), {**known, **others.get(i, {})})
    assert len(BLOCKS) == README.read_text(encoding="utf-8").count("```python") > 8
    for name in ("model.keras", "student.keras", "tangent.keras", "tangent", "maps.png", "runs/pictures"):
        assert Path(name).exists(), name
