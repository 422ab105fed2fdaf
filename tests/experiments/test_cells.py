"""Cells of a study: trained once, kept whole, and not mixed up."""

import json

import pytest

from experiments import cells
from experiments.errors import ExperimentError


def test_a_finished_cell_is_not_run_again(tmp_path):
    path, settings, calls = tmp_path / "cells" / "one.json", {"strength": 0.1}, []

    def run():
        calls.append(1)
        return {"accuracy": 0.5}

    for _ in range(2):
        assert cells.finished_or_run(path, settings, run) == {"accuracy": 0.5}
    assert len(calls) == 1
    assert json.loads(path.read_text())["settings"] == settings


def test_a_cell_that_fails_leaves_no_file(tmp_path):
    def run():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cells.finished_or_run(tmp_path / "one.json", {}, run)
    assert list(tmp_path.iterdir()) == []


def test_a_cell_of_other_settings_is_an_error(tmp_path):
    path = tmp_path / "one.json"
    cells.finished_or_run(path, {"strength": 0.1, "seed": 0}, lambda: {"accuracy": 0.5})
    with pytest.raises(ExperimentError, match=r"strength was 0\.1 and is now 0\.2\. Choose another --folder"):
        cells.finished_or_run(path, {"strength": 0.2, "seed": 0}, lambda: {"accuracy": 0.6})


def test_a_cell_of_a_table():
    assert cells.percent([0.25, 0.75]) == "50.00 ± 35.36"
    assert cells.percent([0.25]) == "25.00"
