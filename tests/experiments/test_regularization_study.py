"""The regularization study: each method does what its name says, and a small run of all."""

import json

import keras
import numpy as np
import pytest

import jvpreg
from experiments import data, models
from experiments.__main__ import main
from experiments.config import DataConfig, ModelConfig
from experiments.regularization import study
from experiments.regularization.config import RegularizationConfig

SMALL = ["--data.name=digits", "--model.name=vgg4", "--model.width=4", "--batch_size=32", "--steps=6"]
OPTIONS = ["--examples_per_class=[50]", "--seeds=[0, 1]", "--dropout=[]", "--bias_decay=[]", "--probed=16"]


def test_the_rows():
    config = RegularizationConfig(dropout=[0.5], bias_decay=[0.1], bias_jacobian=[10.0, 1000.0])
    names = [method.name for method in study.methods(config)]
    assert names[1:] == ["dropout 0.5", "bias weight decay 0.1", "bias-Jacobian 10", "bias-Jacobian 1000"]


def test_a_small_run_and_its_continuation(tmp_path, capsys):
    words = ["regularization", *SMALL, *OPTIONS, f"--folder={tmp_path}"]
    assert main(words) == 0
    summary = json.loads((tmp_path / "regularization.json").read_text())
    names = [row["method"] for row in summary["rows"]]
    assert names == ["no regularization", "bias-Jacobian 100"]
    for row in summary["rows"]:
        assert len(row["columns"]["50"]) == 2
        assert all(
            0 <= one["test_accuracy"] <= 1 and one["bias_jacobian_norm_squared"] > 0 for one in row["columns"]["50"]
        )
    first = capsys.readouterr().out
    assert "33.25 ± 0.6" in first
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert len(written) == 4
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()} == written


def test_too_few_examples(tmp_path, capsys):
    words = [*SMALL, "--examples_per_class=[5000]", f"--folder={tmp_path}"]
    assert main(["regularization", *words]) == 2
    assert "must lie between" in capsys.readouterr().err


@pytest.mark.parametrize(("normalized", "name"), [(True, "norm4"), (False, "conv4")])
def test_the_layer_is_the_last_with_a_bias(normalized, name):
    dataset = data.load(DataConfig())
    model = models.build(ModelConfig("vgg4", 4, batch_normalization=normalized), dataset)
    layer = study.last_biased_layer(model)
    assert layer.name == name
    split = dataset.test.take(slice(10))
    value = study.bias_jacobian_norm_squared(model, name, split, batch_size=4)
    whole = jvpreg.full_jacobian(model, split.images(), target=split.labels)
    contributions = keras.ops.convert_to_numpy(whole.bias_jacobians[name])
    np.testing.assert_allclose(value, np.mean(np.sum(contributions**2, axis=(1, 2, 3))), rtol=1e-5)


def test_the_penalty_leaves_less_of_the_bias_jacobian():
    config = RegularizationConfig(
        DataConfig(), ModelConfig("vgg4", 4), steps=40, batch_size=32, probed=64, bias_jacobian=[1000.0]
    )
    dataset = data.balanced_subset(data.load(config.data), 200)
    chosen = study.methods(config)
    plain, penalized = (study.trained(config, method, dataset, seed=0) for method in (chosen[0], chosen[-1]))
    assert penalized["bias_jacobian_norm_squared"] < 0.3 * plain["bias_jacobian_norm_squared"]
