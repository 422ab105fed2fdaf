"""Products, probes, bias-Jacobians and distillation: checked before they are timed; what is wrong gets no time."""

import dataclasses
import json
from pathlib import Path

import keras
import numpy as np
import pytest
from sizes import SMALL

import jvpreg
from experiments.__main__ import parse
from experiments.benchmark import (
    biases_study,
    distill_study,
    entries,
    probe_entries,
    probe_study,
    study,
    weights_study,
)
from experiments.benchmark.config import BiasesConfig, DistillConfig, ProbeConfig, WeightsConfig
from experiments.config import ModelConfig
from experiments.errors import ExperimentError
from experiments.studies import BENCHMARKS

CONFIGS = Path(__file__).parents[2] / "configs"

pytestmark = pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="the benchmark's competitors are those of TensorFlow and JAX"
)


@pytest.fixture(scope="module")
def weights_config(tmp_path_factory):
    return WeightsConfig(**SMALL, folder=str(tmp_path_factory.mktemp("weights")))


@pytest.fixture(scope="module")
def weights_summary(weights_config):
    return weights_study.STUDY.run(weights_config)


@pytest.mark.slow
def test_products_along_every_kernel_are_checked_and_timed(weights_summary):
    rows = {row["name"]: row for row in weights_summary["entries"]}
    assert list(rows) == ["forward", "primal", "input", "dense1", "dense2", "logits", "all"]
    for row in rows.values():
        assert row["status"] == "ok"
        assert 0 <= row["error"] < 1e-5
        assert row["seconds"] > 0
        assert 0 < row["ratio_quartiles"][0] <= row["ratio"] <= row["ratio_quartiles"][1]
    assert rows["forward"]["ratio"] == 1
    # 48 pixels, two hidden layers of 4 and 10 logits: 192, 16 and 40 multiplications.
    remaining = {"input": 248, "dense1": 248, "dense2": 56, "logits": 40, "all": 248 + 56}
    assert all(rows[name]["expected_ratio"] == pytest.approx(1 + count / 248) for name, count in remaining.items())


def test_the_files_of_the_products_say_the_same(weights_summary, weights_config):
    folder = Path(weights_config.folder)
    assert json.loads((folder / "weights.json").read_text()) == json.loads(json.dumps(weights_summary))
    assert (folder / "weights.png").read_bytes().startswith(b"\x89PNG")
    lines = (folder / "weights.md").read_text().splitlines()
    assert len(lines) == 2 + len(weights_summary["entries"]) + 2
    assert weights_summary["machine"]["processor"] in lines[-1]


def test_a_wrong_product_gets_no_time(weights_config, tmp_path, monkeypatch):
    right = jvpreg.Linearization.jvp

    def too_long(self, u=None, weights=None):
        moved = {variable.path for variable, _ in weights or ()}
        return (1.01 if moved == {"dense2/kernel"} else 1.0) * right(self, u, weights)

    monkeypatch.setattr(jvpreg.Linearization, "jvp", too_long)
    summary = weights_study.STUDY.run(dataclasses.replace(weights_config, folder=str(tmp_path), rounds=1))
    rows = {row["name"]: row for row in summary["entries"]}
    assert [name for name, row in rows.items() if row["status"] == "wrong"] == ["dense2"]
    assert rows["dense2"]["error"] == pytest.approx(0.01, rel=1e-2)
    assert rows["dense2"]["seconds"] is rows["dense2"]["ratio"] is None
    assert weights_study.columns(rows["dense2"])["× forward pass"] == "wrong"
    assert not study.is_right(float("nan"), weights_config)


@pytest.mark.slow
def test_several_probes_through_convolutions_and_pooling_are_checked(weights_config):
    config = dataclasses.replace(weights_config, model=ModelConfig("vgg4", 2), image_size=8, num_probes=2)
    model = entries.plain_model(config)
    every = weights_study.model_entries(model, config)
    assert [entry.name for entry in every[3:-1]] == ["conv1", "conv2", "conv3", "conv4", "logits"]
    chosen = [entry for entry in every if entry.name in ("input", "conv3", "all")]
    errors = weights_study.check(model, chosen, config)
    assert len(errors) == 3
    assert all(0 < error < 1e-5 for error in errors.values())


def test_the_configuration_of_the_products_is_valid():
    file = CONFIGS / "benchmark_weights.yaml"
    _, config = parse("experiments benchmark", BENCHMARKS, ["weights", f"--config={file}", "--num_probes=4"])
    assert (config.num_probes, config.batch_size, config.model.name) == (4, 64, "vgg6")


def off_by_a_percent(lin):
    tensors, products = probe_entries.estimates(probe_entries.norm)(lin)
    return [1.01 * tensors[0], *tensors[1:]], products


PROBED = ("forward", "linearize", "probe", "callback", "jvp_1", "jvp_9", "vjp_9", "unet_forward", "unet_spectral_norm")
WRONG_PROBE = probe_entries.Entry(
    "wrong", "1% too long", "classifier", off_by_a_percent, probe_entries.check_frobenius_norm
)


@pytest.fixture(scope="module")
def probe_config(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("probe"))
    return ProbeConfig(**SMALL, unet_image_size=8, unet_batch_size=1, folder=folder)


@pytest.fixture(scope="module")
def probe_summary(probe_config):
    chosen = [entry for entry in probe_entries.ENTRIES if entry.name in PROBED]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe_study, "ENTRIES", (*chosen, WRONG_PROBE))
        patch.setattr(probe_study, "EXAMPLES", 2)
        return probe_study.STUDY.run(probe_config)


@pytest.mark.slow
def test_a_probe_is_checked_and_timed_and_never_traced_again(probe_summary):
    rows = {row["name"]: row for row in probe_summary["entries"]}
    assert set(rows) == {*PROBED, "wrong"}
    for name in PROBED:
        row = rows[name]
        assert row["status"] == "ok"
        assert 0 <= row["error"] <= row["allowed_error"] < 2e-3
        assert row["traces"] >= 1
        assert row["traces_again"] == 0
        assert row["seconds"] > 0
    assert rows["forward"]["ratio"] == rows["unet_forward"]["ratio"] == 1
    # The Jacobian of 10 outputs is materialized twice; that of 192 inputs and 640 outputs is not.
    assert rows["probe"]["num_products"] == rows["callback"]["num_products"] == 20
    assert 20 <= rows["unet_spectral_norm"]["num_products"] < 192
    assert rows["jvp_9"]["num_products"] == 9


def test_a_wrong_estimate_gets_no_time(probe_summary):
    row = next(row for row in probe_summary["entries"] if row["name"] == "wrong")
    assert row["status"] == "wrong"
    assert row["error"] == pytest.approx(0.01, rel=1e-2)
    assert row["seconds"] is row["ratio"] is None
    assert probe_study.columns(row)["× forward pass"] == "wrong"


def test_the_cost_of_a_further_product_follows_from_two_entries(probe_summary):
    ratios = {row["name"]: row["ratio"] for row in probe_summary["entries"]}
    assert probe_summary["further_product"]["jvp"] == pytest.approx((ratios["jvp_9"] - ratios["jvp_1"]) / 8)
    assert probe_summary["further_product"]["vjp"] is None  # of which one entry was left out
    aims = {aim["name"]: aim for aim in probe_summary["aims"]}
    assert (aims["probe"]["aim"], aims["probe"]["measured"]) == (60, ratios["probe"])
    assert aims["further_vjp"]["met"] is None


def test_the_files_of_the_probe_say_the_same(probe_summary, probe_config):
    folder = Path(probe_config.folder)
    assert json.loads((folder / "probe.json").read_text()) == json.loads(json.dumps(probe_summary))
    assert (folder / "probe.png").read_bytes().startswith(b"\x89PNG")
    lines = (folder / "probe.md").read_text().splitlines()
    assert len(lines) == 2 + len(probe_summary["entries"]) + 2


def test_an_entry_that_is_traced_again_gets_no_time(probe_config, monkeypatch):
    # A function that is not compiled is run by Python at each call, so it counts as traced again.
    monkeypatch.setattr(probe_study, "compiled", lambda function, jit: function)
    chosen = [entry for entry in probe_entries.ENTRIES if entry.name in ("forward", "linearize")]
    subject = probe_study.classifier(probe_config)
    errors = dict.fromkeys(("forward", "linearize"), (0.0, 1.0))
    rows = probe_study.timed_rows(subject, chosen, errors, probe_config)
    assert [row["status"] for row in rows] == ["traced again"] * 2
    assert [row["traces_again"] for row in rows] == [16, 16]  # two rounds of eight calls
    assert rows[1]["ratio"] is None


def test_every_estimator_of_the_probe_is_right(probe_config):
    subject = probe_study.classifier(probe_config)
    chosen = [entry for entry in probe_entries.ENTRIES if entry.network == "classifier"]
    errors = probe_study.check(subject, [entry for entry in chosen if entry.name not in PROBED], probe_config)
    assert set(errors) >= {"stable_rank", "top_singular_values", "spectral_density", "frobenius_norm", "vjp_1"}
    assert all(probe_study.is_right(error) for error in errors.values()), errors


def test_what_is_not_a_number_is_infinitely_far_off():
    found = probe_entries.Found(np.array([1.0, np.nan]), np.ones(2))
    assert found.errors(0.1) == (np.inf, 0.1)
    # The reported error of an estimate is allowed: the same small error weighs less if the estimate reports one.
    found = probe_entries.Found(np.array([1.2, 1.1]), np.ones(2), slack=np.array([0.5, 0.0]))
    assert found.errors(0.0) == (pytest.approx(0.1), 0.0)


def test_a_probe_is_traced_once_for_all_epochs():
    calls = []

    def norm(lin):
        calls.append(len(calls))
        return jvpreg.estimators.frobenius_norm(lin)

    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5, "tanh"), keras.layers.Dense(3)])
    model.compile(loss="mse")
    x, y = np.ones((4, 6), "float32"), np.ones((4, 3), "float32")
    after = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: epochs.append(len(calls)))
    epochs: list[int] = []
    model.fit(x, y, epochs=3, verbose=0, callbacks=[jvpreg.callbacks.JacobianProbe(x, {"norm": norm}), after])
    assert len(epochs) == 3
    assert epochs[0] >= 1
    assert epochs == [epochs[0]] * 3


def test_the_configuration_of_the_probe_is_valid():
    file = CONFIGS / "benchmark_probe.yaml"
    _, config = parse("experiments benchmark", BENCHMARKS, ["probe", f"--config={file}", "--rounds=3"])
    assert (config.rounds, config.batch_size, config.model.name, config.model.width) == (3, 64, "vgg9", 16)
    with pytest.raises(ExperimentError, match="unet_image_size"):
        probe_study.STUDY.run(ProbeConfig(unet_image_size=10))


@pytest.fixture(scope="module")
def biases_config(tmp_path_factory):
    return BiasesConfig(
        model=ModelConfig("vgg4", 2, batch_normalization=False),
        image_size=8,
        batch_size=4,
        jit_compile=keras.backend.backend() == "jax",
        rounds=1,
        warmup=0,
        folder=str(tmp_path_factory.mktemp("biases")),
    )


@pytest.mark.slow
def test_bias_penalties_are_checked_and_timed(biases_config):
    summary = biases_study.STUDY.run(biases_config)
    rows = {row["name"]: row for row in summary["entries"]}
    assert list(rows) == [entry.name for entry in biases_study.ENTRIES]
    assert rows["plain"]["penalty_error"] is None
    for name, row in rows.items():
        assert row["status"] == "ok"
        assert row["seconds"] > 0
        if name != "plain":
            assert max(row["penalty_error"], row["gradient_error"]) < 1e-4
    table = (Path(biases_config.folder) / "biases.md").read_text()
    assert "double backpropagation, last convolution" in table


@pytest.mark.slow
def test_a_wrong_bias_penalty_is_seen(biases_config, monkeypatch):
    right = jvpreg.regularizers.BiasJacobianNorm.penalty
    monkeypatch.setattr(jvpreg.regularizers.BiasJacobianNorm, "penalty", lambda self, seen: 1.01 * right(self, seen))
    checked = biases_study.check(next(e for e in biases_study.ENTRIES if e.name == "last"), biases_config)
    assert checked.penalty_error == pytest.approx(0.01, rel=1e-2)
    assert checked.gradient_error == pytest.approx(0.01, rel=1e-2)


@pytest.fixture(scope="module")
def distill_config(tmp_path_factory):
    network = ModelConfig("vgg4", 2, batch_normalization=False)
    return DistillConfig(
        model=network,
        teacher=dataclasses.replace(network, name="vgg6"),
        image_size=16,
        batch_size=4,
        jit_compile=keras.backend.backend() == "jax",
        rounds=1,
        warmup=0,
        folder=str(tmp_path_factory.mktemp("distill")),
    )


@pytest.mark.slow
def test_distillation_is_checked_and_timed(distill_config):
    summary = distill_study.STUDY.run(distill_config)
    rows = {row["name"]: row for row in summary["entries"]}
    assert list(rows) == list(distill_study.LABELS)
    for name, row in rows.items():
        assert row["status"] == "ok"
        assert row["seconds"] > 0
        if name != "plain":
            assert max(row["penalty_error"], row["gradient_error"]) < 1e-4
    table = (Path(distill_config.folder) / "distill.md").read_text()
    assert "double backpropagation, the same" in table


@pytest.mark.slow
def test_a_wrong_distance_is_seen(distill_config, monkeypatch):
    monkeypatch.setitem(distill_study.WEIGHTS, "jacobian", 0.02)
    made = distill_study.losses(*[distill_study.network(distill_config, role) for role in ("teacher", "student")])
    monkeypatch.undo()
    monkeypatch.setattr(distill_study, "losses", lambda teacher, student: made)
    assert distill_study.check("full", distill_config).penalty_error > 1e-3
