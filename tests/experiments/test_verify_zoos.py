"""Zoos of small models: what tutorials build has the products that autodiff has, and a row says what failed."""

import dataclasses
import json
import sys

import keras
import pytest
from keras import ops

import jvpreg
from experiments.errors import ExperimentError
from experiments.verify import study
from experiments.verify.config import VerifyConfig
from experiments.verify.measure import FLOAT64
from experiments.verify.zoos import draws, measure, member, report, times
from experiments.verify.zoos.member import Member

TUTORIALS = VerifyConfig(zoo="tutorials")


def of_products(one, config=TUTORIALS):
    row = {}
    with measure.float64():
        for part in measure.products(measure.drawn(one, config), measure.generator(config)):
            row.update(part)
    return row


def of_uses(one, config=TUTORIALS):
    model, x = measure.model_and_inputs(one, config, 2 * config.batch_size)
    row = {}
    for part in measure.uses(one, model, x, config.batch_size):
        row.update(part)
    return row


@pytest.mark.parametrize("one", member.members("tutorials"), ids=lambda one: one.name)
def test_what_a_tutorial_builds_has_the_products_of_autodiff(one):
    row = of_products(one)
    assert all(row[name] < 1e-12 for name in FLOAT64), row
    assert row["jacobian"] > 1e-3
    assert row["left"] == {}


@pytest.mark.parametrize("name", ["VAE", "TabTransformer"])
def test_a_model_trains_with_a_penalty_and_comes_back_from_its_file(name):
    assert of_uses(member.named("tutorials", [name])[0]) == {"fit": "ok", "save": "ok"}


def tokens():
    ids = keras.Input((4,), dtype="int32", name="ids")
    embedded = keras.layers.Embedding(5, 3, name="embedding")(ids)
    attended = keras.layers.MultiHeadAttention(1, 4)(embedded, embedded)
    return keras.Model({"ids": ids}, [keras.layers.Dense(2)(attended), ops.argmax(attended, axis=-1)])


TOKENS = Member("tokens", tokens, draws.named(ids=draws.whole(5, 4)), "embedding")


def test_tokens_are_differentiated_by_what_their_embedding_returns():
    row = of_products(TOKENS)
    assert all(row[name] < 1e-12 for name in FLOAT64), row
    assert row["jacobian"] > 1e-3


@pytest.mark.parametrize(
    "narrowed",
    [
        lambda x: ops.cast(x, "float32"),
        lambda x: ops.segment_sum(x, ops.array([0, 1]), num_segments=2),
        lambda x: ops.ones(2),
    ],
    ids=["cast", "segment_sum", "ones"],
)
def test_what_has_float32_whatever_it_is_given_has_float64_within_alone(narrowed):
    x = ops.convert_to_tensor([1.0, 2.0], "float64")
    before = narrowed(x).dtype
    with measure.float64():
        assert keras.backend.standardize_dtype(narrowed(x).dtype) == "float64"
    assert narrowed(x).dtype == before


class Twice(keras.layers.Layer):
    def call(self, x):
        return 2 * x


def test_a_wrong_rule_and_what_fails_are_called_so():
    @jvpreg.register_rule(Twice)
    def rule(layer, x, context):
        return 2 * x, jvpreg.rules.linear(lambda tangent: 2.0001 * tangent)

    def make():
        return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), Twice()])

    one = Member("twice", make, draws.normal(3))
    row = {**of_products(one), **of_uses(one)}
    assert row["vjp"] == pytest.approx(5e-5, rel=1e-2)
    assert report.status(row, dataclasses.asdict(TUTORIALS)) == "wrong"
    assert row["fit"] == "ok"
    assert "could not be deserialized" in row["save_failure"]  # `Twice` is not registered


def test_a_status_is_no_better_than_the_worst_figure():
    settings = dataclasses.asdict(TUTORIALS)
    row = {**dict.fromkeys(FLOAT64, 1e-14), **dict.fromkeys(measure.USES, "ok"), "left": {}}
    assert report.status(row, settings) == "ok"
    assert report.status({**row, "vjp": float("nan")}, settings) == "wrong"
    assert report.status({**row, "left": {"slice": "no rule"}}, settings) == "incomplete"
    assert report.status({key: row[key] for key in row if key != "save"}, settings) == "incomplete"
    assert report.status({**row, "failure": "stopped"}, settings) == "incomplete"


def test_the_study_writes_the_rows_of_a_zoo(tmp_path, monkeypatch):
    good = {"jacobian": 1.0, "left": {}, "nodes": 3, **dict.fromkeys(FLOAT64, 1e-14), "fit": "ok", "save": "ok"}
    rows = {"SIREN": good, "NeRF": {**good, "left": {"rendering/cumprod": "no rule"}, "fit_failure": "ValueError: no"}}
    monkeypatch.setattr(measure, "row", lambda one, config: rows[one.name])
    summary = study.run(VerifyConfig(zoo="tutorials", only=["SIREN", "NeRF"], folder=str(tmp_path), times=True))
    assert {row["name"]: row["status"] for row in summary["rows"]} == {"SIREN": "ok", "NeRF": "incomplete"}
    assert json.loads((tmp_path / "verify.json").read_text()) == json.loads(json.dumps(summary))
    text = (tmp_path / "verify.md").read_text()
    assert "NeRF, left to autodiff: `rendering/cumprod` (no rule)." in text
    assert "NeRF, fit: ValueError: no." in text


@pytest.mark.parametrize("one", [member.named("tutorials", ["SIREN"])[0], TOKENS], ids=lambda one: one.name)
def test_a_product_is_timed_beside_the_others(one):
    model, x = measure.model_and_inputs(one, TUTORIALS, 2)
    row = {}
    for part in times.figures(model, x, one.at, VerifyConfig(jit=False), rounds=1, most_calls=1):
        row.update(part)
    assert row["best"] in ("forward_mode", "linearize", "double_vjp", "batch_jacobian")
    assert min(row["trace_seconds"], row["forward_passes"], row["speed_up"]) > 0


def test_keys_are_told():
    with pytest.raises(ExperimentError, match="only: tutorials has no model 'Nerf'"):
        member.named("tutorials", ["Nerf"])


def test_a_missing_package_is_told_in_a_sentence(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "keras_hub" or ".zoos.hub_" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    with pytest.raises(ExperimentError, match=r"needs keras-hub, .* `pip install 'jvpreg\[zoo\]'`"):
        member.members("keras_hub")


@pytest.mark.parametrize("name", ["GPT2", "ViT"])
def test_a_backbone_of_keras_hub_has_the_products_of_autodiff(name):
    pytest.importorskip("keras_hub")
    row = of_products(member.named("keras_hub", [name])[0])
    assert all(row[name] < 1e-12 for name in FLOAT64), row
    assert row["jacobian"] > 1e-3
    assert row["left"] == {}
