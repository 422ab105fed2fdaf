"""The code of the README and of pages that leave out the model runs, on models and data small enough for a test."""

import csv
from pathlib import Path

import keras
import numpy as np
import pytest
import scipy.sparse.linalg
import wandb
from compare import normal, randomize
from keras import layers

import jvpreg
from tests.callbacks.offline_run import written
from tests.experiments import wandb_records
from tests.pages import DOCS, README, blocks


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
    """An offline run of Weights & Biases."""
    settings = wandb.Settings(silent=True, console="off")
    run = wandb.init(mode="offline", dir=tmp_path, settings=settings)
    yield run
    run.finish()


@pytest.mark.slow
def test_the_block_of_the_readme_is_told_whole(tmp_path, monkeypatch, run, capfd):
    """What it leaves in W&B, on disk and on the screen, on every backend, also without TensorFlow."""
    monkeypatch.chdir(tmp_path)
    images, labels = normal(4, 8, 8, 3).astype("float32"), np.arange(4)
    known = {"my_keras_model": images_to_logits(3), "x_probe": images}
    known |= {name: OneBatch(images, labels) for name in ("train", "test")}
    ((code, _),) = blocks(README)
    exec(compile(code.replace("epochs=10,", "epochs=2,"), README.name, "exec"), known)
    run.finish()
    records = wandb_records.records(written(tmp_path / "wandb"))
    rows = wandb_records.history(tmp_path / "wandb")
    logged = known["model"].history.history
    assert [row["epoch/epoch"] for row in rows] == [row["_step"] for row in rows] == [0, 1]
    places = ("jacobian/", "jacobian/after/conv3/")
    norms = {f"{place}{norm}" for place in places for norm in ("frobenius_norm", "spectral_norm")}
    assert {"loss", "accuracy", "val_loss", "val_accuracy", "frobenius_norm_squared"} < set(logged)
    assert norms | {f"{norm}_sem" for norm in norms} < set(logged)
    for key, values in logged.items():
        assert [float(row[f"epoch/{key}"]) for row in rows] == pytest.approx(values), key
    assert all(sum(row[f"{norm}_histogram/values"]) == len(images) for row in rows for norm in norms)
    charts = {record.metric.glob_name: record.metric.step_metric for record in records if record.HasField("metric")}
    assert charts["epoch/*"] == charts["jacobian/*"] == "epoch/epoch"
    pictures = {file.name for file in Path("runs/pictures").iterdir()}
    assert pictures == {f"{norm.removeprefix('jacobian/').replace('/', '-')}.png" for norm in norms}
    with open("runs/log.csv") as file:
        table = list(csv.DictReader(file))
    for key, values in logged.items():
        assert [float(row[key]) for row in table] == values, key
    assert isinstance(keras.models.load_model("model.keras"), jvpreg.JacobianModel)
    told = [line for line in capfd.readouterr().out.splitlines() if line.startswith("    ")]
    assert [line.split("‖J‖")[0].strip() for line in told] == 2 * ["", "after/conv3:"]


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a SavedModel is among what it writes")
def test_the_code_of_the_tour(tmp_path, monkeypatch):
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
    # Values that one block needs and that differ from those of the other blocks, by the place of the block.
    others = {3: {"teacher": images_to_logits(5), "student": images_to_logits(7), "y": labels}, 4: rows, 5: vectors}
    tour, tracking = blocks(DOCS / "tour.md"), blocks(DOCS / "tracking.md")
    assert len(tour) > 7
    for i, (code, _) in enumerate(tour + tracking):
        exec(compile(code, f"block {i}", "exec"), {**known, **others.get(i, {})})
    for name in ("student.keras", "tangent.keras", "tangent", "maps.png"):
        assert Path(name).exists(), name
