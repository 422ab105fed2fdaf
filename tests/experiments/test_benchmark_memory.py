"""`benchmark memory`: bytes are counted once, a process measures itself, and a wrong entry gets no bytes."""

import dataclasses
import json
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import jvpreg
from experiments import processes
from experiments.__main__ import parse
from experiments.benchmark import memory_entries, memory_study
from experiments.benchmark.config import MemoryConfig
from experiments.config import ModelConfig
from experiments.studies import BENCHMARKS

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return MemoryConfig(
        model=ModelConfig("vgg4", 2),
        image_size=8,
        batch_size=4,
        num_probes=2,
        jit_compile=keras.backend.backend() == "jax",
        folder=str(tmp_path_factory.mktemp("memory")),
    )


def sizes_of(name, mode, config):
    """Sizes that differ from entry to entry, so that entries can be told apart."""
    number = [entry.name for entry in memory_entries.ENTRIES].index(name) + 1
    return {
        "baseline": 1000,
        "peak": 20 * number,
        "held": 10 * number,
        "counted": None if name == "forward" else number,
    }


@pytest.fixture(scope="module")
def summary(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_study, "sizes_of", sizes_of)
        return memory_study.STUDY.run(config)


def test_entries_are_checked_and_set_beside_training(summary, config):
    modes = ["eager"] if keras.backend.backend() == "torch" else ["eager", summary["mode"]]
    names = [entry.name for entry in memory_entries.ENTRIES]
    assert [(row["mode"], row["name"]) for row in summary["entries"]] == [(m, n) for m in modes for n in names]
    for row in summary["entries"]:
        assert row["status"] == "ok"
        assert (row["error"] is None) == (row["name"] in ("forward", "training", "gradient"))
        assert row["error"] is None or 0 < row["error"] < 1e-5
    aim = summary["aims"][0]
    assert (aim["name"], aim["mode"]) == ("linearization", "eager")
    assert (aim["held"], aim["counted"], aim["met"]) == (40 / 20, 4 / 2, False)


def test_the_files_of_the_memory_say_the_same(summary, config):
    folder = Path(config.folder)
    assert json.loads((folder / "memory.json").read_text()) == json.loads(json.dumps(summary))
    text = (folder / "memory.md").read_text()
    assert "holds 2.00 times what plain training keeps" in text
    assert summary["machine"]["processor"] in text


@pytest.mark.slow
def test_a_process_measures_what_an_entry_holds(config):
    larger = dataclasses.replace(config, image_size=32, batch_size=64, model=ModelConfig("vgg4", 8))
    found = memory_study.sizes_of("linearization", "eager", larger)
    # At the least, the outputs of the first convolution, its normalization and its ReLU in float32.
    least = 3 * 64 * 32 * 32 * 8 * 4
    assert found["counted"] > least
    assert 0.9 * found["counted"] < found["held"] < 1.5 * found["counted"]
    assert found["held"] < 1.1 * found["peak"]  # the system counts pages in batches
    assert found["baseline"] > 10**8


def test_a_process_that_is_killed_has_run_out_of_memory_and_another_failure_is_told(monkeypatch):
    def failed(text):
        monkeypatch.setattr(processes, "row", lambda *arguments: {"held": 1, "failure": text})
        return processes.memory(memory_study.sizes, ("product",))

    assert isinstance(failed("exit status -9: no message"), MemoryError)
    assert isinstance(failed("exit status 1: ResourceExhaustedError: OOM"), MemoryError)
    with pytest.raises(RuntimeError, match="the memory of 'product' failed: exit status 1: ValueError: no"):
        failed("exit status 1: ValueError: no")
    with pytest.raises(RuntimeError, match="stopped after 3600 s"):
        failed("stopped after 3600 s")


@pytest.mark.every_backend
@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("entry", memory_entries.ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_runs(entry, mode, config):
    subject = memory_entries.subject(config, 2, None if mode == "eager" else config.jit_compile)
    held = entry.make(subject)
    counted = memory_entries.counted_bytes(held, subject)
    if entry.name == "training" and keras.backend.backend() == "tensorflow":
        assert counted is None
    else:
        assert counted >= (0 if entry.name == "training" else 4 * 10 * 4)


@pytest.mark.every_backend
def test_buffers_are_counted_once_and_the_weights_never(config):
    subject = memory_entries.subject(config, 1, None)
    tensor = ops.convert_to_tensor(np.arange(1000, dtype="float32")) + 1
    other = ops.ones((50,), "float32") * 2
    held = [tensor, tensor, other, subject.x, ops.convert_to_tensor(subject.model.variables[0].value)]
    assert memory_entries.counted_bytes(held, subject) == 4 * 1050


def test_residuals_are_less_than_the_outputs_of_all_nodes(config):
    subject = memory_entries.subject(config, 1, None)
    lin = jvpreg.linearize(subject.model, subject.x)
    needed = list(memory_entries.residuals(lin))
    assert len({id(tensor) for tensor in needed}) == len(needed) > 5
    assert 0 < memory_entries.counted_bytes(needed, subject) < memory_entries.counted_bytes(lin, subject)


def test_an_entry_with_a_wrong_product_gets_no_bytes(config, monkeypatch):
    right = jvpreg.Linearization.jvp
    monkeypatch.setattr(jvpreg.Linearization, "jvp", lambda self, u: 1.01 * right(self, u))
    monkeypatch.setattr(memory_study, "sizes_of", sizes_of)
    errors = memory_study.check(["eager"], config)
    error = errors["eager", False]
    assert list(errors.values()) == [pytest.approx(0.01, rel=1e-2)] * 2
    entry = next(entry for entry in memory_entries.ENTRIES if entry.name == "product")
    row = memory_study.row(entry, "eager", error, config)
    assert row["status"] == "wrong"
    assert row["peak_bytes"] is row["held_bytes"] is None
    assert memory_study.columns(row)["peak MB"] == "wrong"


def test_the_configuration_of_the_memory_is_valid():
    file = CONFIGS / "benchmark_memory.yaml"
    _, config = parse("experiments benchmark", BENCHMARKS, ["memory", f"--config={file}", "--num_probes=4"])
    assert (config.num_probes, config.batch_size, config.model.name) == (4, 256, "vgg6")
