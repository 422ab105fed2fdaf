"""Whole architectures: a wrong product is called wrong, and a row says so if something could not be measured."""

import dataclasses
import json

import keras
import pytest
from keras import layers

import jvpreg
from experiments import processes
from experiments.__main__ import main, parse
from experiments.errors import ExperimentError
from experiments.studies import STUDIES
from experiments.verify import architectures, measure, report, study
from experiments.verify.architectures import ARCHITECTURES, Architecture
from experiments.verify.config import VerifyConfig
from experiments.verify.measure import FIGURES, FLOAT64, JIT, MIXED

CONFIG = VerifyConfig(jit=False)
RNN = Architecture("RNN", (3, 2), architectures.rnn)


def small(input_shape):
    x = keras.Input(input_shape)
    y = layers.BatchNormalization()(layers.Conv2D(4, 3)(x))
    y = layers.Flatten()(layers.MaxPooling2D()(layers.ReLU()(y)))
    return keras.Model(x, layers.Dense(3)(y))


def measured(architecture, config=CONFIG):
    row = {"name": architecture.name, "input_shape": architecture.input_shape}
    for part in measure.figures(architecture, config):
        row.update(part)
    return {**row, "status": report.status(row, dataclasses.asdict(config))}


def with_layer(layer):
    def make(input_shape):
        x = keras.Input(input_shape)
        return keras.Model(x, layers.Dense(3)(layer()(layers.Dense(4)(x))))

    return Architecture("with_layer", (3,), make)


class Twice(layers.Layer):
    def call(self, x):
        return 2 * x


@pytest.mark.slow
@pytest.mark.every_backend
@pytest.mark.parametrize("architecture", [RNN, Architecture("small", (6, 6, 2), small)], ids=lambda a: a.name)
def test_an_architecture_is_measured(architecture):
    backend = keras.backend.backend()
    if backend == "jax" and architecture is RNN:
        pytest.skip("JAX compiles what is not jitted op by op, which takes half a minute")
    jit = architecture is not RNN and backend != "torch"
    row = measured(architecture, VerifyConfig(jit=jit))
    assert row["status"] == "ok", row
    assert row["nodes"] > 2
    assert row["jacobian"] > 1e-2
    assert set(FIGURES) & set(row) == set(FIGURES) - (set() if jit else set(JIT))
    assert all(row[name] < 1e-12 for name in FLOAT64)
    assert 0 < row["float32_jvpreg"] < 1e-5
    # Errors are those of 11 and of 8 bits, so neither run was in float32; and the policy is restored afterwards.
    assert 1e-5 < row["float16_jvpreg"] < 2e-2
    assert 1e-3 < row["bfloat16_jvpreg"] < 2e-1
    assert keras.config.dtype_policy().name == "float32"


def test_a_wrong_rule_is_called_wrong():
    @jvpreg.register_rule(Twice)
    def rule(layer, x, context):
        return 2 * x, jvpreg.rules.linear(lambda tangent: 2.0001 * tangent)

    row = measured(with_layer(Twice))
    assert row["status"] == "wrong"
    assert all(row[name] == pytest.approx(5e-5, rel=1e-2) for name in ("jvp", "vjp"))
    assert row["completeness"] < 1e-12  # the intercept makes up for it, so that this alone would not tell
    assert measured(with_layer(layers.ReLU))["status"] == "ok"


def test_what_raises_is_named_and_the_other_figures_are_kept(monkeypatch):
    def raises(self, weight, direction):
        raise RuntimeError("a traceback:\n  ValueError: no such product\nArguments received by f")

    monkeypatch.setattr(measure.Products, "autodiff_weight_jvp", raises)
    row = measured(with_layer(layers.ReLU))
    assert row["weight_jvp_failure"] == "ValueError: no such product"
    assert row["status"] == "incomplete"
    assert row["completeness"] < 1e-12
    assert report.columns(row, dataclasses.asdict(CONFIG))["∂W"] == "failed"


def test_a_model_that_cannot_be_made_in_16_bits_keeps_the_other_figures():
    def layer():
        if keras.config.dtype_policy().name == "mixed_float16":
            raise ValueError("no float16")
        return layers.ReLU()

    row = measured(with_layer(layer))
    assert row["float16_jvpreg_failure"] == row["float16_autodiff_failure"] == "ValueError: no float16"
    assert 0 < row["bfloat16_jvpreg"] < 1e-1
    assert row["status"] == "ok"
    assert row["seconds"] > 0


def test_a_node_without_a_rule_fails_the_row(capsys):
    class Opaque(layers.Layer):
        def call(self, x):
            if isinstance(x, keras.KerasTensor):
                raise TypeError("no symbols")
            return x

        def compute_output_shape(self, shape):
            return shape

    processes.print_parts(measure.figures, (with_layer(Opaque), CONFIG))
    *_, last = capsys.readouterr().out.splitlines()
    assert "Opaque) has no pushforward rule" in json.loads(last)["failure"]


def test_a_process_that_takes_too_long_is_stopped():
    assert measure.row(architectures.find("NASNetMobile"), VerifyConfig(time_limit=1)) == {
        "failure": "stopped after 1 s"
    }


def test_every_family_and_the_papers_13_are_there():
    def families(names):
        functions = [getattr(keras.applications, name) for name in names]
        return {f.__module__ for f in functions if getattr(f, "__module__", "").startswith("keras.src.applications.")}

    ours = [a.name for a in ARCHITECTURES if hasattr(keras.applications, a.name)]
    assert families(ours) == families(dir(keras.applications))
    assert len(families(ours)) > 10
    assert sum(a.paper for a in ARCHITECTURES) == 13
    assert len({a.name for a in ARCHITECTURES}) == len(ARCHITECTURES)


def test_the_study_writes_each_row_and_resumes(tmp_path, monkeypatch):
    good = {"nodes": 3, "jacobian": 1.0, "seconds": 1.0, **dict.fromkeys(FIGURES, 1e-10)}
    results = {"RNN": good, "UNet": {"failure": "exit status -9: no message"}}
    asked = []

    def row(architecture, config):
        asked.append(architecture.name)
        return results[architecture.name]

    monkeypatch.setattr(measure, "row", row)
    config = VerifyConfig(only=["UNet", "RNN"], folder=str(tmp_path))
    summary = study.STUDY.run(config)
    assert [row["status"] for row in summary["rows"]] == ["ok", "incomplete"]
    assert json.loads((tmp_path / "verify.json").read_text()) == json.loads(json.dumps(summary))
    text = (tmp_path / "verify.md").read_text()
    assert "UNet: exit status -9: no message." in text
    assert "Not run: VGG16, " in text
    assert '--only=["UNet", "RNN"]' in text

    asked.clear()
    results["UNet"] = {**good, "jit_autodiff": 0.1}
    summary = study.STUDY.run(dataclasses.replace(config, resume=True))
    assert asked == ["UNet"]
    assert [row["status"] for row in summary["rows"]] == ["ok", "ok"]


def test_a_status_is_no_better_than_the_worst_figure():
    settings = dataclasses.asdict(VerifyConfig())
    row = {**dict.fromkeys(FIGURES, 1e-10)}
    assert report.status(row, settings) == "ok"
    assert report.status({**row, "vjp": float("nan")}, settings) == "wrong"
    assert report.status({**row, "jit_jvpreg": 2e-3}, settings) == "wrong"
    assert report.status({**row, "jit_jvpreg": 2e-3, "float32_autodiff": 2e-3}, settings) == "ok"
    assert report.status({key: row[key] for key in FLOAT64}, settings) == "incomplete"


@pytest.mark.parametrize(("autodiff", "ours"), MIXED.values())
def test_in_16_bits_a_value_must_be_finite_where_autodiffs_is(autodiff, ours):
    settings = dataclasses.asdict(VerifyConfig())
    row = {**dict.fromkeys(FIGURES, 1e-10)}
    infinite, missing = {**row, ours: float("nan")}, {key: row[key] for key in FIGURES if key != ours}
    assert report.status({**row, ours: 0.5}, settings) == "ok"
    assert report.status(infinite, settings) == "wrong"
    assert report.status(missing, settings) == "incomplete"
    assert report.status({**infinite, autodiff: float("inf")}, settings) == "ok"
    assert report.status({**missing, autodiff: float("inf")}, settings) == "ok"


def test_the_keys_are_typed_and_unknown_names_are_told(capsys):
    _, config = parse("experiments", STUDIES, ["verify", "--only=[VGG16]", "--jit=false"])
    assert (config.only, config.jit) == (["VGG16"], False)
    with pytest.raises(ExperimentError, match="no architecture 'VGG17'"):
        study.chosen_architectures(VerifyConfig(only=["VGG17"]))
    assert main(["verify", "--batch_szie=3"]) == 2
    assert "batch_szie" in capsys.readouterr().err
