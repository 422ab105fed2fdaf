"""Runs side by side: trained once each, told in a table, a figure and JSON."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments import tables
from experiments.compare import compare
from experiments.config import (
    CompareConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ProbeConfig,
    RobustnessConfig,
    TrainConfig,
    WandbConfig,
)
from experiments.errors import ExperimentError


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    shared = TrainConfig(
        data=DataConfig(train_examples=128),
        model=ModelConfig("mlp", 16),
        probe=ProbeConfig(examples=8),
        robustness=RobustnessConfig(examples=50, noise=[0.1], epsilons=[0.05], pgd_steps=2),
        wandb=WandbConfig(mode="disabled"),
        optimizer=OptimizerConfig(learning_rate=0.01),
        epochs=6,
        batch_size=32,
    )
    folder = str(tmp_path_factory.mktemp("comparison"))
    return CompareConfig(shared, strengths=[0.0, 0.1], timed_steps=3, folder=folder)


@pytest.fixture(scope="module")
def summary(config):
    return compare(config)


@pytest.mark.slow
def test_the_penalty_shrinks_the_jacobian(summary):
    plain, regularized = summary["rows"]
    assert (plain["run"], regularized["run"]) == ("plain", "strength 0.1")
    assert regularized["jacobian/frobenius_norm"] < 0.8 * plain["jacobian/frobenius_norm"]
    assert all(0 < row["seconds_per_step"] < 10 for row in summary["rows"])


def test_the_files_say_the_same(summary, config):
    folder = Path(config.folder)
    assert json.loads((folder / "comparison.json").read_text()) == summary
    assert summary["machine"].keys() >= {"processor", "cores", "backend", "keras"}
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    lines = (folder / "comparison.md").read_text().splitlines()
    header, rule, plain, regularized = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[:4])
    assert header == [
        "run",
        "test accuracy",
        "‖J‖_F",
        "σ₁",
        "noise 0.1",
        "FGSM 0.05",
        "PGD 0.05",
        "ms a step",
    ]
    assert set("".join(rule)) == {"-", ":"}
    assert plain[0] == "plain"
    assert regularized == list(tables.columns(summary["rows"][1]).values())
    assert summary["machine"]["processor"] in lines[-1]


@pytest.mark.slow
def test_finished_runs_are_not_trained_again(summary, config, monkeypatch):
    monkeypatch.setattr("experiments.train.train_on", lambda *arguments: pytest.fail("trained again"))
    again = compare(config)
    strip = [{key: row[key] for key in row if key != "seconds_per_step"} for row in again["rows"]]
    assert strip == [{key: row[key] for key in row if key != "seconds_per_step"} for row in summary["rows"]]


def test_runs_of_another_configuration_are_not_passed_off(summary, config):
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=7))
    with pytest.raises(ExperimentError, match="epochs was 6 and is now 7"):
        compare(other)
