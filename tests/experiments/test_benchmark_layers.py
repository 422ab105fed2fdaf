"""`benchmark layers`: every layer has right products, and a wrong or failing one gets no time."""

import dataclasses
import json
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import jvpreg
from experiments.__main__ import parse
from experiments.benchmark import calls, layers_cases, layers_study, measure, products
from experiments.benchmark.config import LayersConfig
from experiments.errors import ExperimentError
from experiments.studies import BENCHMARKS
from experiments.verify import weights

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = {"batch_size": 2, "image_size": 4, "channels": 2, "sequence_length": 2, "units": 8, "num_probes": 2}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("layers"))
    jit = keras.backend.backend() == "jax"
    return LayersConfig(**SIZES, jit_compile=jit, rounds=2, warmup=0, folder=folder, only=["Dropout", "Add"])


@pytest.fixture(scope="module")
def summary(config):
    return layers_study.STUDY.run(config)


def test_layers_are_checked_and_timed_beside_both_alternatives(summary):
    assert [row["name"] for row in summary["layers"]] == ["Dropout", "Add"]
    for row in summary["layers"]:
        assert list(row["products"]) == ["plain", "jvpreg", "forward_mode", "double_vjp"]
        for part in row["products"].values():
            assert part["status"] == "ok", part
            assert 0 <= part["error"] < 1e-5
            assert 0 < part["ratio_quartiles"][0] <= part["ratio"] <= part["ratio_quartiles"][1]
        assert row["products"]["plain"]["ratio"] == 1
        assert row["best_alternative"]["name"] in ("forward_mode", "double_vjp")
        assert row["best_alternative"]["over_jvpreg"] > 0


def test_the_files_of_the_layers_say_the_same(summary, config):
    folder = Path(config.folder)
    assert json.loads((folder / "layers.json").read_text()) == json.loads(json.dumps(summary))
    assert (folder / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert summary["machine"]["processor"] in (folder / "layers.md").read_text()


@pytest.mark.filterwarnings("ignore:.*ends in a softmax")
@pytest.mark.parametrize("case", layers_cases.CASES, ids=lambda case: case.name)
def test_jvpreg_is_right_for_every_layer(case, config, monkeypatch):
    monkeypatch.setattr(layers_study, "EXAMPLES", 2)
    monkeypatch.setattr(calls, "compiled", lambda function, jit: function)
    if keras.backend.backend() == "jax" and case.name in ("GroupNormalization", "LSTM", "GRU", "MultiHeadAttention"):
        pytest.skip("JAX compiles what is not jitted op by op")
    model = case.model(config)
    weights.draw(model, np.random.default_rng(0))
    error = layers_study.check(case, model, layers_study.exact_model(case, model, config), "jvpreg", config)
    assert isinstance(error, float), error
    assert error < 1e-5


def test_a_wrong_product_of_a_layer_gets_no_time(config, tmp_path, monkeypatch):
    right = jvpreg.jvp

    def wrong(*arguments, **options):
        y, product = right(*arguments, **options)
        return y, 1.01 * product

    monkeypatch.setattr(jvpreg, "jvp", wrong)
    summary = layers_study.STUDY.run(dataclasses.replace(config, only=["Add"], folder=str(tmp_path), rounds=1))
    (row,) = summary["layers"]
    part = row["products"]["jvpreg"]
    assert part["status"] == "wrong"
    assert part["error"] == pytest.approx(0.01, rel=1e-2)
    assert part["seconds"] is part["ratio"] is row["best_alternative"] is None
    assert row["products"]["forward_mode"]["status"] == "ok"
    assert layers_study.columns(row)["× layer"] == "wrong (1e-02)"


def test_an_alternative_that_raises_is_named_and_the_others_are_timed(config, monkeypatch):
    def raises(point):
        raise TypeError("no forward mode")

    starts = {**layers_study.starts(config), "forward_mode": raises}
    monkeypatch.setattr(layers_study, "starts", lambda config: starts)
    row = layers_study.row(layers_cases.CASES[0], dataclasses.replace(config, rounds=1))
    assert row["products"]["forward_mode"]["status"] == "failed"
    assert layers_study.failures_of(row) == ["forward mode: TypeError: no forward mode"]
    assert row["best_alternative"]["name"] == "double_vjp"


def test_the_best_alternative_is_the_faster_one_in_units_of_jvpreg():
    taken = {
        "jvpreg": measure.Turns(0.0, [1.0, 2.0, 4.0]),
        "forward_mode": measure.Turns(0.0, [3.0, 6.0, 12.0]),
        "double_vjp": measure.Turns(0.0, [2.0, 4.0, 8.0]),
    }
    best = layers_study.best_alternative(taken)
    assert best == {"name": "double_vjp", "over_jvpreg": 2.0, "over_jvpreg_quartiles": (2.0, 2.0)}
    taken["double_vjp"] = MemoryError()
    assert layers_study.best_alternative(taken)["name"] == "forward_mode"
    del taken["jvpreg"]
    assert layers_study.best_alternative(taken) is None


def test_dropout_is_checked_by_the_mask_that_it_drew():
    x, u = np.full((1, 4), 3.0), np.arange(4.0).reshape(1, 1, 4)
    y, product = layers_cases.dropped(np.array([[6.0, 0.0, 0.0, 6.0]]), [x], [u])
    assert y.tolist() == [[6, 0, 0, 6]]
    assert product.tolist() == [[[0, 0, 0, 6]]]
    received = [ops.convert_to_tensor(tensor) for tensor in (y, 1.01 * product)]
    assert products.worst(received, [y, product]) == pytest.approx(0.01)


def test_the_configuration_of_the_layers_is_valid():
    file = CONFIGS / "benchmark_layers.yaml"
    _, config = parse("experiments benchmark", BENCHMARKS, ["layers", f"--config={file}", "--num_probes=4"])
    assert (config.num_probes, config.batch_size, config.units) == (4, 32, 128)
    with pytest.raises(ExperimentError, match="no entry 'Desne'"):
        layers_study.STUDY.run(LayersConfig(only=["Desne"]))
    with pytest.raises(ExperimentError, match="units: expected a multiple of 8"):
        layers_study.STUDY.run(LayersConfig(units=12))
