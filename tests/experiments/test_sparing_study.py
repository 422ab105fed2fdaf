"""The sparing study: what each row computes, and a small run of all."""

import json

from experiments.__main__ import main
from experiments.sparing import study
from experiments.sparing.config import SparingConfig

SMALL = ["--data.name=digits", "--data.train_examples=60", "--model.name=vgg4", "--model.width=4"]


def test_the_rows():
    config = SparingConfig(intervals=[2, 4], fractions=[0.5])
    found = {method.name: (method.interval, method.fraction) for method in study.methods(config) if method.strength}
    assert found == {"every step": (1, 1.0), "interval=2": (2, 1.0), "interval=4": (4, 1.0), "fraction=0.5": (1, 0.5)}


def test_a_small_run_and_its_continuation(tmp_path, capsys):
    words = ["sparing", *SMALL, "--seeds=[0, 1]", "--strength=1", "--probed=70", "--batch_size=20", "--intervals=[2]"]
    # Six long steps, after which the penalty has about halved the norm.
    words += ["--epochs=2", "--optimizer.learning_rate=0.03", f"--folder={tmp_path}"]
    assert main(words) == 0
    summary = json.loads((tmp_path / "sparing.json").read_text())
    assert [row["method"] for row in summary["rows"]] == ["no penalty", "every step", "interval=2", "fraction=0.25"]
    norms = {row["method"]: [one["frobenius_norm"] for one in row["results"]] for row in summary["rows"]}
    assert all(len(set(found)) == 2 for found in norms.values())
    assert len({found[0] for found in norms.values()}) == 4  # no two methods train alike
    assert all(less < more for less, more in zip(norms["every step"], norms["no penalty"], strict=True))
    assert "every step" in capsys.readouterr().out
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert len(written) == 8
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()} == written


def test_the_table():
    results = [{"test_accuracy": 0.5, "frobenius_norm": 1.0}, {"test_accuracy": 0.52, "frobenius_norm": 2.0}]
    assert study.columns({"method": "every step", "results": results}) == {
        "method": "every step",
        "‖J‖_F": "1.5 ± 0.71",
        "test accuracy": "51.00 ± 1.41",
    }


def test_keys_are_checked(capsys):
    assert main(["sparing", "--fractions=[0]"]) == 2
    assert "fractions" in capsys.readouterr().err
