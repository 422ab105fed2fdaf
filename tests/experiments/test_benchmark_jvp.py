"""The benchmarks of `J u`: each competitor is checked before it is timed, and a wrong one gets no time."""

import dataclasses
import json
import math

import keras
import numpy as np
import pytest
from keras import layers, ops

from experiments import processes
from experiments.__main__ import parse
from experiments.benchmark import (
    competitors,
    counts_study,
    jvp_study,
    literal,
    products,
    products_study,
)
from experiments.benchmark.competitors import Entry
from experiments.benchmark.config import IterateConfig, JvpConfig, ProbesConfig
from experiments.benchmark.directions import FEEDBACK
from experiments.errors import ExperimentError
from experiments.studies import BENCHMARKS
from experiments.verify import architectures
from experiments.verify.architectures import Architecture

BACKEND = keras.backend.backend()
CONFIG = {"jit_compile": BACKEND == "jax", "rounds": 2, "warmup": 0}
FEW = {"jvpreg", "arithmetic", "clone", "forward_mode", "double_vjp", "batch_jacobian"} | (
    set() if BACKEND == "tensorflow" else {"linearize"}
)


def small(input_shape):
    x = keras.Input(input_shape)
    y = layers.BatchNormalization()(layers.Conv2D(4, 3, activation="relu")(x))
    y = layers.MaxPooling2D()(layers.ReLU()(y))
    y = layers.Concatenate()([y, layers.Activation("relu")(y)])
    return keras.Model(x, layers.Dense(3)(layers.Flatten()(y)))


def smooth(input_shape):
    x = keras.Input(input_shape)
    return keras.Model(x, layers.Dense(3)(layers.Dense(4, activation="tanh")(x)))


SMALL, SMOOTH = Architecture("small", (6, 6, 2), small, paper=True), Architecture("smooth", (5,), smooth, paper=True)


def too_long(point):
    push = competitors.forward_mode(point)

    def wrong(tangents):
        y, product = push(tangents)
        return y, 1.01 * product

    return wrong


def raises(point):
    raise ValueError("no such product")


def with_entries(monkeypatch, *entries):
    monkeypatch.setitem(competitors.ENTRIES, BACKEND, (*competitors.ENTRIES[BACKEND][:2], *entries))


def by_name(comparison):
    return {entry["name"]: entry for entry in comparison["entries"]}


@pytest.fixture(scope="module")
def measured():
    row = {"name": "small"}
    for part in jvp_study.parts(SMALL, JvpConfig(**CONFIG)):
        row.update(part)
    return row


@pytest.mark.slow
@pytest.mark.every_backend
def test_every_competitor_is_right_and_timed(measured):
    assert (measured["input_shape"], measured["output_shape"]) == ([6, 6, 2], [3])
    for along in ("input", "weight"):
        rows = by_name(measured[along])
        assert set(rows) == {"forward", *FEW} - ({"clone", "arithmetic"} if along == "weight" else set())
        for name, row in rows.items():
            assert row["status"] == "ok", row
            assert row["error"] < 1e-5
            assert row["seconds"] > 0
            assert row["first_call_seconds"] > 0
            assert row["ratio"] == 1 if name == "forward" else row["ratio"] > 0
        assert measured[along]["best_alternative"] in FEW - {"jvpreg", "arithmetic", "clone"}
        assert measured[along]["speed_up"] == sorted(measured[along]["speed_up"])


def test_a_wrong_product_gets_no_time_and_is_no_alternative(monkeypatch):
    with_entries(
        monkeypatch,
        Entry("wrong", "1% too long", too_long),
        Entry("raises", "raises", raises),
        Entry("clone", "jvpreg.clone", competitors.clone, alternative=False, model=literal.cloned, only=("input",)),
    )
    config = JvpConfig(**CONFIG)
    subject = products_study.subject(SMOOTH, config)
    found = products_study.comparison(subject, jvp_study.along_input(subject, 1, config), config)
    rows = by_name(found)
    assert set(rows) == {"forward", "jvpreg", "wrong", "raises"}  # a tanh has no literal clone
    assert rows["wrong"]["status"] == "wrong"
    assert rows["wrong"]["error"] == pytest.approx(0.01, rel=1e-2)
    assert rows["raises"]["status"] == "failed"
    assert rows["raises"]["message"] == "ValueError: no such product"
    assert rows["wrong"]["seconds"] is rows["wrong"]["ratio"] is rows["raises"]["ratio"] is None
    assert rows["jvpreg"]["seconds"] > 0
    assert found["best_alternative"] is found["speed_up"] is None
    assert jvp_study.cell(rows["wrong"]) == "wrong: 1e-02"
    assert jvp_study.speed_up(found) == "no other is right"


def test_no_more_is_asked_than_float32_can_have():
    config = JvpConfig(**CONFIG)
    subject = products_study.subject(SMOOTH, config)
    task = jvp_study.along_input(subject, 1, config)
    outputs, product = products.by_autodiff(subject.model, [subject.x], task.tangents)
    # The product in float64 is made to differ, as if rounding had moved a mask in float32.
    found = products_study.comparison(subject, task, config, [outputs, product / 1.05])
    assert found["allowed_error"] == pytest.approx(0.1, rel=1e-3)
    assert {row["status"] for row in found["entries"]} == {"ok"}


def test_what_is_not_a_number_is_wrong():
    ones = np.ones((2, 3))
    assert products.worst([ones, np.nan * ones], [ones, ones]) == math.inf
    assert products.worst([1.5 * ones], [ones, ones]) == pytest.approx(0.5)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(architectures, "ARCHITECTURES", (SMALL, SMOOTH))


@pytest.mark.slow
@pytest.mark.every_backend
def test_several_directions_are_pushed_at_once(registered, tmp_path):
    config = ProbesConfig(architecture="small", counts=[3, 1], folder=str(tmp_path), **CONFIG)
    summary = counts_study.PROBES.run(config)
    one, three = summary["rows"]
    assert (one["count"], three["count"]) == (1, 3)
    assert set(by_name(one)) == {"forward", *FEW}
    rows = by_name(three)
    assert set(rows) == {"forward", "vectorized", *FEW}
    # Keras' convolution has an operation that Torch cannot vectorize. The function that `torch.func.linearize` returns
    # changes a constant of batch normalization in place, so only its first product is right.
    odd = {"vectorized": "failed", "linearize": "wrong"} if BACKEND == "torch" else {}
    for name, row in rows.items():
        assert row["status"] == odd.get(name, "ok"), row
        assert name in odd or row["error"] < 1e-5
    slope = (rows["jvpreg"]["ratio"] - by_name(one)["jvpreg"]["ratio"]) / 2
    assert summary["further_product"]["jvpreg"] == pytest.approx(slope)
    assert json.loads((tmp_path / "probes.json").read_text()) == json.loads(json.dumps(summary))
    assert (tmp_path / "probes.png").read_bytes().startswith(b"\x89PNG")
    assert "| one more |" in (tmp_path / "probes.md").read_text()


@pytest.mark.slow
@pytest.mark.every_backend
def test_products_one_after_the_other_are_right_and_timed(registered, tmp_path):
    config = IterateConfig(architecture="smooth", counts=[1, 3], folder=str(tmp_path), **CONFIG)
    summary = counts_study.ITERATE.run(config)
    names = {"forward", *FEW} - {"clone", "arithmetic"}
    for row in summary["rows"]:
        assert {entry["name"]: entry["status"] for entry in row["entries"]} == dict.fromkeys(names, "ok")
        assert all(entry["error"] < 1e-5 for entry in row["entries"])
    assert set(summary["further_product"]) == names
    assert (tmp_path / "iterate.md").exists()


@pytest.mark.parametrize("loop", [ops.fori_loop, counts_study.python_loop])
def test_each_direction_depends_on_the_product_before(loop):
    random = np.random.default_rng(0)
    matrix, vector = random.normal(size=(4, 5)).astype("float32"), random.normal(size=(2, 4)).astype("float32")

    def push(tangents):
        return "f(x)", ops.matmul(tangents[0], ops.convert_to_tensor(matrix))

    expected = vector
    for _ in range(2):
        mean = np.mean(expected @ matrix, axis=1, keepdims=True)
        expected = expected + FEEDBACK * mean / (1 + np.abs(mean))
    outputs, product = counts_study.iterated(push, [ops.convert_to_tensor(vector[None])], 3, loop)
    assert outputs == "f(x)"
    moved = np.linalg.norm((expected - vector) @ matrix)
    assert np.linalg.norm(ops.convert_to_numpy(product)[0] - expected @ matrix) < 1e-2 * moved


def test_a_study_writes_each_architecture_and_goes_on(registered, measured, tmp_path, monkeypatch):
    asked = []

    def in_process(architecture, config):
        asked.append(architecture.name)
        return {"failure": "stopped after 1 s"} if architecture is SMOOTH else measured

    monkeypatch.setattr(jvp_study, "row", in_process)
    config = JvpConfig(folder=str(tmp_path), **CONFIG)
    summary = jvp_study.STUDY.run(config)
    assert asked == ["small", "smooth"]
    written = json.loads((tmp_path / "jvp.json").read_text())
    assert written == json.loads(json.dumps(summary))
    assert written["geometric_means"]["input"] == pytest.approx(measured["input"]["speed_up"][1])
    assert (tmp_path / "jvp.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "jvp.md").read_text()
    assert "smooth: stopped after 1 s." in text
    rows = jvp_study.table(summary)
    assert [row["model"] for row in rows] == ["small", "small", "geometric mean", "geometric mean", "smooth"]
    assert len({tuple(row) for row in rows}) == 1  # the same columns in each

    jvp_study.STUDY.run(dataclasses.replace(config, only=["small"]))
    assert asked == ["small", "smooth"]
    with pytest.raises(ExperimentError, match="num_probes was 1 and is now 2"):
        jvp_study.STUDY.run(dataclasses.replace(config, num_probes=2))


def test_the_geometric_mean_is_that_of_the_medians():
    rows = [{"name": str(place), "input": {"speed_up": [0.0, median, 9.0]}} for place, median in enumerate((2.0, 8.0))]
    means = jvp_study.means([*rows, {"name": "stopped"}], ["input", "weight"])
    assert means == {"input": pytest.approx(4.0)}


def test_the_process_prints_what_was_measured(capsys):
    config = JvpConfig(along=["input"], image_size=5, **CONFIG)
    processes.print_parts(jvp_study.parts, (SMOOTH, config))
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["input_shape"] == [5]  # no image
    assert by_name(second["input"])["jvpreg"]["status"] == "ok"


def test_mistakes_in_the_keys_are_told():
    with pytest.raises(ExperimentError, match="only: there is no architecture 'VGG17'"):
        jvp_study.STUDY.run(JvpConfig(only=["VGG17"]))
    with pytest.raises(ExperimentError, match="architecture: there is no architecture 'VGG17'"):
        counts_study.PROBES.run(ProbesConfig(architecture="VGG17"))
    with pytest.raises(ExperimentError, match="counts: expected a number or more"):
        counts_study.PROBES.run(ProbesConfig(counts=[]))
    with pytest.raises(ExperimentError, match="counts: expected two different numbers"):
        counts_study.ITERATE.run(IterateConfig(counts=[4, 4]))


def test_the_default_is_the_papers_13():
    _, config = parse("experiments benchmark", BENCHMARKS, ["jvp", "--along=[input]"])
    assert config.along == ["input"]
    assert len(jvp_study.chosen_architectures(config)) == 13
