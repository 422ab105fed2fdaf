"""The distillation study: what each method matches, and a small run that is cut and goes on."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
import yaml

from experiments import data, models
from experiments.__main__ import main, parse
from experiments.config import DataConfig, ModelConfig
from experiments.distill import cell, study
from experiments.distill.config import DistillConfig, WeightsConfig
from experiments.studies import STUDIES

CONFIGS = Path(__file__).parents[2] / "configs"
TRAIN = ["--model.name=vgg4", "--model.width=4", "--epochs=1", "--probe.examples=4", "--robustness.examples=4"]
OPTIONS = ["--student.name=vgg6", "--student.width=4", "--steps=6", "--batch_size=32", "--probed=16", "--stages=[1, 2]"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    assert main(["train", *TRAIN, "--wandb.mode=disabled", f"--folder={folder}"]) == 0
    return folder


def network(name, normalized=True):
    return models.build(ModelConfig(name, 4, batch_normalization=normalized), data.load(DataConfig()))


def test_the_methods_of_the_paper():
    assert list(cell.MATCHED) == DistillConfig().methods
    for name in study.PAPER:
        assert list(study.PAPER[name]) == DistillConfig().methods
        assert {len(row) for row in study.PAPER[name].values()} == {len(study.PAPER_COLUMNS[name])}
    made = cell.losses(
        "full-Jacobian + attention", WeightsConfig(1, 2, 3, 4), network("vgg9"), network("vgg11"), [1, 3]
    )
    assert [type(loss).__name__ for loss in made] == [
        "ActivationMatching",
        "JacobianMatching",
        "BiasJacobianMatching",
        "AttentionMatching",
    ]
    assert [loss.weight for loss in made] == [1, 2, 3, 4]
    assert made[2].layers == [["norm1", "norm1"], ["norm4", "norm5"]]
    assert made[3].layers == [["relu1", "relu1"], ["relu4", "relu5"]]
    assert cell.last_layers(network("vgg4", normalized=False), "bias", [2, 4]) == ["conv2", "conv4"]


def test_a_small_run_and_its_continuation(teacher, tmp_path, capsys):
    words = ["distill", f"--teacher={teacher}", *OPTIONS, f"--folder={tmp_path}", "--examples_per_class=[5]"]
    words += ["--evaluations=3"]
    both = "--methods=['cross-entropy', 'full-Jacobian + attention']"
    assert main([*words, both, "--seeds=[0]", "--student_sizes=['vgg6', 'vgg4']"]) == 0
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert len(written) == 3
    summary = json.loads((tmp_path / "distill.json").read_text())
    assert [row["method"] for row in summary["rows"]] == ["cross-entropy", "full-Jacobian + attention"]
    for row in summary["rows"]:
        (one,) = row["columns"]["5"]
        assert 0 <= one["test_accuracy"] <= 1
        assert 0 < one["angle"] < 180
        assert len(one["history"]["step"]) == len(one["history"]["val_accuracy"]) == 3
        assert ("train_angle" in one["history"]) == (row["method"] != "cross-entropy")
    # The VGG-6 is the student of the table: no cell of its own.
    assert [row["student"] for row in summary["students"]] == ["vgg6", "vgg4"]
    assert summary["students"][0]["results"] == summary["rows"][1]["columns"]["5"]
    for name in ("methods.png", "students.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert "5 a class" in (tmp_path / "distill.md").read_text()
    # Cells that are there are not trained again.
    assert main([*words, "--methods=['cross-entropy']", "--seeds=[0, 1]"]) == 0
    assert len(list((tmp_path / "cells").iterdir())) == 4
    assert {path: path.stat().st_mtime_ns for path in written} == written
    # If a method does not use a weight, changing this weight does not change its cells; otherwise it does.
    alone = [*words, "--seeds=[0]", "--weights.attention=3"]
    assert main([*alone, "--methods=['cross-entropy']"]) == 0
    assert main([*alone, "--methods=['full-Jacobian + attention']"]) == 2
    assert "weights.attention was 0.003 and is now 3" in capsys.readouterr().err


def test_without_augmentation_the_teacher_is_seen_once(teacher):
    dataset = data.balanced_subset(data.load(DataConfig()), 40)
    config = DistillConfig(steps=4, batch_size=20, probed=10, stages=[1, 2], evaluations=2)
    taught = keras.models.load_model(teacher / "model.keras", compile=False).base
    result = cell.trained(config, "attention", taught, network("vgg6"), dataset, seed=0)
    assert result["history"]["step"] == [2, 4]
    assert np.isfinite(result["angle"])


def test_what_does_not_fit(teacher, tmp_path, capsys):
    words = ["distill", f"--teacher={teacher}", *OPTIONS, f"--folder={tmp_path}"]
    assert main([*words, "--stages=[5]"]) == 2
    assert "vgg4 has 4 stages" in capsys.readouterr().err
    assert main([*words, "--student.name=mlp"]) == 2
    assert "must be VGGs" in capsys.readouterr().err
    assert main(["distill", f"--teacher={tmp_path}"]) == 2
    assert "there is no trained model in" in capsys.readouterr().err


def test_the_configurations_are_valid():
    sweep = yaml.safe_load((CONFIGS / "sweeps" / "distill.yaml").read_text())
    keys = [f"--{key}={values['values'][-1]}" for key, values in sweep["parameters"].items()]
    words = [f"--config={CONFIGS / 'distill.yaml'}", *[word for word in sweep["command"] if word.startswith("--st")]]
    _, config = parse("experiments", STUDIES, ["distill", *words, *keys])
    assert (config.methods, config.examples_per_class, config.seeds) == (["full-Jacobian + attention"], [5000], [2])
    assert config.student_sizes == []
    assert {method for text in sweep["parameters"]["methods"]["values"] for method in yaml.safe_load(text)} == set(
        cell.MATCHED
    )


def test_the_tables_hold_the_paper_s():
    one = {"test_accuracy": 0.5, "angle": 80.0}
    row = {"method": "attention", "columns": {"50": [one, {**one, "test_accuracy": 0.52}], "7": [one]}}
    assert study.columns(row, "cifar10") == {
        "method": "attention",
        "50 a class": "51.00 ± 1.41",
        "paper, 50": "68.11 ± 0.8",
        "7 a class": "50.00",
        "paper, 7": "–",
    }
    assert study.angle_columns(row) == {
        "method": "attention",
        "angle, 50 a class": "80.0",
        "angle, 7 a class": "80.0",
    }
    assert study.columns(row, "digits")["paper, 50"] == "–"
