"""What every study does with its measurements."""

import json
from dataclasses import dataclass

import keras
import pytest
from matplotlib.figure import Figure

from experiments.benchmark.config import TimingConfig
from experiments.benchmark.study import Benchmark
from experiments.errors import ExperimentError
from experiments.study import Study, one_table


@dataclass
class Config:
    folder: str
    number: int = 3


def measured(config, console):
    console.print("measuring")
    return {"rows": [{"number": config.number}, {"number": 2 * config.number}]}


def columns(row):
    return {"model": "small", "number": str(row["number"])}


def caption(summary):
    return f"Settings [red]of[/red] {summary['settings']['number']}."


FIGURES = {"drawn": lambda summary: Figure(), "empty": lambda summary: None}


def test_a_study_writes_and_prints_what_it_measured(tmp_path, capsys):
    study = Study("numbers", measured, one_table("rows", columns, caption), FIGURES, stem="file")
    summary = study.run(Config(str(tmp_path)))
    assert list(summary) == ["study", "settings", "machine", "rows"]
    assert summary["settings"] == {"folder": str(tmp_path), "number": 3}
    assert json.loads((tmp_path / "file.json").read_text()) == summary
    table = "| model | number |\n| --- | ---: |\n| small | 3 |\n| small | 6 |"
    assert (tmp_path / "file.md").read_text() == f"{table}\n\nSettings [red]of[/red] 3.\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn.png", "file.json", "file.md"]
    printed = capsys.readouterr().out
    assert printed.startswith("measuring\n")
    assert "Settings [red]of[/red] 3.\n" in printed  # printed as it is; rich does not take it for a color


def test_a_benchmark_is_refused_on_a_backend_that_it_does_not_know_before_it_measures():
    others = tuple({"tensorflow", "jax", "torch"} - {keras.backend.backend()})
    benchmark = Benchmark("numbers", pytest.fail, caption, backends=others)
    with pytest.raises(ExperimentError, match="benchmark numbers runs on TensorFlow and JAX: set KERAS_BACKEND"):
        benchmark.run(TimingConfig())


@pytest.mark.parametrize(("jit", "mode"), [(True, ("xla", "jit", "compile")), (False, ("graph", "eager", "eager"))])
def test_the_folder_of_a_benchmark_is_named_after_backend_and_mode(jit, mode):
    backend = keras.backend.backend()
    word = dict(zip(("tensorflow", "jax", "torch"), mode, strict=True))[backend]
    benchmark = Benchmark("numbers", measured, caption, variant=lambda config: "-odd")
    assert str(benchmark.folder(TimingConfig(jit_compile=jit))) == f"runs/benchmark/numbers-{backend}-{word}-odd"
    assert str(benchmark.folder(TimingConfig(folder="own"))) == "own"
