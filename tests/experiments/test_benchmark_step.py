"""The steps of training: each entry is checked before it is timed, and a wrong one gets no time."""

import dataclasses
import json
from pathlib import Path

import keras
import pytest
from rich.console import Console
from sizes import SMALL

from experiments import processes
from experiments.__main__ import main, parse
from experiments.benchmark import autodiff, checked, entries, step_study
from experiments.benchmark.checked import Check
from experiments.benchmark.config import StepConfig
from experiments.benchmark.entries import Entry
from experiments.config import ModelConfig
from experiments.errors import ExperimentError
from experiments.studies import BENCHMARKS

CONFIGS = Path(__file__).parents[2] / "configs"


def too_long(model, x, draw):
    y, product = autodiff.forward(model, x, draw)
    return y, 1.01 * product


WRONG = Entry("wrong", "1% too long", "input", too_long)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return StepConfig(**SMALL, memory=False, folder=str(tmp_path_factory.mktemp("benchmark")))


@pytest.fixture(scope="module")
def summary(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entries, "ENTRIES", (*entries.ENTRIES, WRONG))
        return step_study.STUDY.run(config)


@pytest.mark.slow
@pytest.mark.every_backend
def test_every_entry_is_checked_and_timed(summary):
    rows = {row["name"]: row for row in summary["entries"]}
    assert list(rows) == [*(entry.name for entry in entries.ENTRIES), "wrong"]
    for entry in entries.ENTRIES:
        row = rows[entry.name]
        assert row["status"] == "ok"
        assert row["seconds"] > 0
        assert row["first_call_seconds"] > 0
        assert 0 < row["ratio_quartiles"][0] <= row["ratio"] <= row["ratio_quartiles"][1]
        if entry.name != "plain":
            assert 0 < row["penalty_error"] < summary["settings"]["tolerance"]
            assert 0 < row["gradient_error"] < summary["settings"]["tolerance"]
    assert rows["plain"]["ratio"] == 1


@pytest.mark.slow
def test_convolutions_pooling_and_normalization_are_checked_too(config):
    config = dataclasses.replace(config, model=ModelConfig("vgg4", 2), image_size=8)
    derivatives = {"norm_fraction": "frozen", "double_backpropagation": "coupled"}
    if keras.backend.backend() == "jax":  # JAX compiles a reference op by op, so one entry must do
        del derivatives["double_backpropagation"]
    for name, derivative in derivatives.items():
        entry = next(entry for entry in entries.ENTRIES if entry.name == name)
        assert entry.derivative(config) == derivative
        assert step_study.check(entry, config).error < config.tolerance


def test_a_wrong_entry_gets_no_time(summary):
    row = summary["entries"][-1]
    assert row["status"] == "wrong"
    assert row["penalty_error"] == pytest.approx(1.01**2 - 1, rel=1e-2)
    assert row["seconds"] is row["ratio"] is row["ratio_quartiles"] is row["peak_memory_bytes"] is None
    columns = step_study.columns(row)
    assert columns["× plain step"] == "wrong"
    assert columns["error"] == "2e-02"
    assert columns["ms"] == ""


def test_the_files_say_the_same(summary, config):
    folder = Path(config.folder)
    assert json.loads((folder / "step.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["settings"]["batch_size"] == 4
    assert summary["machine"].keys() >= {"processor", "cores", "memory_gigabytes", "backend", "keras"}
    assert (folder / "step.png").read_bytes().startswith(b"\x89PNG")
    lines = (folder / "step.md").read_text().splitlines()
    assert len(lines) == 2 + len(summary["entries"]) + 2
    assert summary["machine"]["processor"] in lines[-1]


def test_an_entry_without_enough_memory_is_named_and_the_others_go_on(config, monkeypatch):
    class Model:
        def train_on_batch(self, x, y):
            pass

    def build(entry, config):
        if entry.name == "norm_4":
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes\n  at …")
        return Model()

    monkeypatch.setattr(entries, "training_model", build)
    monkeypatch.setattr(step_study, "check", lambda entry, config: checked.Check(0.0, 0.0))
    found = step_study.measured(dataclasses.replace(config, only=["norm_4"]), Console(quiet=True))
    plain, row = found["entries"]
    assert plain["status"] == "ok"
    assert plain["seconds"] > 0
    assert row["status"] == "out of memory"
    assert row["message"] == "RuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"
    with pytest.raises(ValueError, match="shape"):
        processes.out_of_memory(ValueError("wrong shape"))


@pytest.mark.slow
def test_the_peak_memory_is_that_of_a_process_of_its_own(config):
    ballast = bytes(10**9)  # which the other process must not inherit
    assert 0 < step_study.peak_bytes("plain", config) < len(ballast)


def test_an_error_that_is_not_a_number_is_infinite():
    assert Check(0.0, float("nan")).error == float("inf")


def test_the_configuration_is_valid_and_unknown_names_are_told(tmp_path, capsys):
    _, config = parse(
        "experiments benchmark",
        BENCHMARKS,
        ["step", f"--config={CONFIGS / 'benchmark_step.yaml'}", "--model.width=3"],
    )
    assert (config.model.width, config.batch_size) == (3, 64)
    with pytest.raises(ExperimentError, match="no entry 'nrom_1'"):
        step_study.STUDY.run(StepConfig(only=["nrom_1"]))
    assert main(["benchmark", "step", "--wdith=3"]) == 2
    assert "wdith" in capsys.readouterr().err
