"""The health study: what counts as told apart, and a small run of it."""

import json

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.health import study
from experiments.health.config import HealthConfig


def record(curve, sem=0.0):
    mean = list(map(float, curve))
    parts = {"mean": mean, "sem": [sem * value for value in mean]}
    return {"steps": [10 * i for i in range(len(mean))], "measures": {"loss": parts}, "final_accuracy": 0.5}


HEALTHY = [record([1.0, 1.1, 1.2, 1.1, 1.0]), record([1.0, 0.9, 0.8, 0.9, 1.0])]


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([1, 1, 1, 1, 1], None),
        ([1, 1, 2, 2, 2], 20),
        ([1, 1, 0.3, 0.3, 0.3], 20),
        ([1, 2, 1, 2, 2], None),
        ([1, 2, np.nan, np.inf, 2], 10),
    ],
)
def test_a_run_is_told_apart_by_what_lasts(curve, expected):
    assert study.told_apart(record(curve), HEALTHY, "loss") == expected


def test_an_error_bar_widens_what_counts_as_healthy():
    assert study.told_apart(record([1, 2, 2, 2, 2]), HEALTHY, "loss") == 10
    assert study.told_apart(record([1, 2, 2, 2, 2], sem=0.5), HEALTHY, "loss") is None


def test_healthy_runs_are_held_against_each_other():
    found = study.rows(
        {study.HEALTHY: [*HEALTHY, record([3, 3, 3, 3, 3])], "sick": [record([9, 9, 9, 9, 9])]}, ("loss",)
    )
    assert [row["told_apart"]["loss"] for row in found] == [None, None, 0, 0]


def test_settings_differ_in_one_key():
    config = HealthConfig()
    healthy, *others = study.all_settings(config).values()
    assert healthy == config.train
    for other in others:
        changed = [key for key in vars(healthy) if vars(healthy)[key] != vars(other)[key]]
        assert len(changed) == 1
    assert not others[1].model.batch_normalization


def test_cross_entropies_are_those_of_large_logits_too():
    found = study.cross_entropies(np.array([[1000.0, 0.0], [0.0, 1000.0]]), np.array([0, 0]))
    np.testing.assert_allclose(found, [0.0, 1000.0])


def test_a_small_run(tmp_path, capsys):
    words = [
        "--train.model.name=mlp",
        "--train.model.width=4",
        "--train.data.train_examples=80",
        "--train.epochs=1",
        "--train.batch_size=20",
        "--train.probe.examples=4",
        "--healthy_runs=2",
        "--loss_examples=16",
        "--every_batches=3",
        f"--folder={tmp_path}",
    ]
    assert main(["health", *words]) == 0
    summary = json.loads((tmp_path / "health.json").read_text())
    assert [row["setting"] for row in summary["rows"]] == ["healthy"] * 2 + [
        "learning rate too large",
        "no normalization",
        "penalty too strong",
    ]
    one = summary["runs"]["healthy"][0]
    assert one["steps"] == [0, 1, 2, 3, 4]
    for parts in one["measures"].values():
        assert len(parts["mean"]) == len(parts["sem"]) == 5
        assert np.all(np.array(parts["mean"]) > 0)
    assert (tmp_path / "health.png").stat().st_size > 10_000
    assert "The step from which on each measure tells a run" in capsys.readouterr().out
