"""`benchmark scale`: points are checked and timed once each, and exponents are those of power laws."""

import dataclasses
import json
from pathlib import Path

import keras
import numpy as np
import pytest

import jvpreg
from experiments.__main__ import parse
from experiments.benchmark import scale_study
from experiments.benchmark.config import ScaleConfig
from experiments.errors import ExperimentError
from experiments.studies import BENCHMARKS

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return ScaleConfig(
        batch_size=2,
        width=2,
        depth=1,
        batch_sizes=[1, 2, 4],
        widths=[1, 2, 3],
        depths=[1, 2, 3],
        probes=[1, 2, 3],
        image_size=4,
        jit_compile=keras.backend.backend() == "jax",
        rounds=2,
        warmup=0,
        folder=str(tmp_path_factory.mktemp("scale")),
    )


@pytest.fixture(scope="module")
def summary(config):
    return scale_study.STUDY.run(config)


@pytest.mark.slow
def test_every_point_is_checked_and_timed(summary):
    assert list(summary["axes"]) == ["batch", "width", "depth", "probes"]
    for axis, row in summary["axes"].items():
        assert [point["size"] for point in row["points"]] == ([1, 2, 4] if axis == "batch" else [1, 2, 3])
        for point in row["points"]:
            for name in ("forward", "jvpreg"):
                assert point[name]["status"] == "ok"
                assert 0 < point[name]["error"] < 1e-5
                assert point[name]["seconds"] > 0
            assert point["over_forward"] > 0
    batch = summary["axes"]["batch"]
    assert np.isfinite(batch["fits"]["jvpreg"]["exponent"])
    assert batch["points"][1]["forward"]["ratio"] == 1  # the base point
    assert batch["at_zero"] == 0 < summary["axes"]["probes"]["at_zero"]


def test_the_base_point_is_timed_once(config):
    keys = scale_study.all_keys(config)
    assert len(keys) == len(set(keys))
    # Each axis has two more points, but points along the probes have no forward pass of their own.
    assert [name for name, _ in keys].count("forward") == 1 + 6
    assert [name for name, _ in keys].count("jvpreg") == 1 + 8


def test_the_files_of_the_points_say_the_same(summary, config):
    folder = Path(config.folder)
    assert json.loads((folder / "scale.json").read_text()) == json.loads(json.dumps(summary))
    assert (folder / "scale.png").read_bytes().startswith(b"\x89PNG")
    assert summary["machine"]["processor"] in (folder / "scale.md").read_text()


def test_exponents_are_those_of_a_power_law():
    sizes = np.array([1.0, 2.0, 4.0, 8.0])
    fit = scale_study.power_law(sizes, 3 * sizes**1.5)
    assert (fit.exponent, fit.constant) == (pytest.approx(1.5), pytest.approx(3))
    assert fit.sem == pytest.approx(0, abs=1e-12)
    # Against numpy's covariance.
    noisy = 3 * sizes**1.5 * np.array([1.1, 0.9, 1.0, 1.2])
    (slope, _), covariance = np.polyfit(np.log(sizes), np.log(noisy), 1, cov=True)
    fit = scale_study.power_law(sizes, noisy)
    assert (fit.exponent, fit.sem) == (pytest.approx(slope), pytest.approx(np.sqrt(covariance[0, 0])))
    rows = [{"size": size, "jvpreg": {"ratio": 1 + 2 * size}} for size in (1, 2, 4)]
    assert scale_study.fitted(rows, "jvpreg", 1.0)["exponent"] == pytest.approx(1)
    assert scale_study.fitted(rows[:2], "jvpreg", 1.0) is None


def test_a_wrong_point_gets_no_time_and_no_place_in_the_fit(config, tmp_path, monkeypatch):
    right = jvpreg.Linearization.jvp

    def wrong_for_three(self, u):
        return (1.01 if u.shape[0] == 3 else 1.0) * right(self, u)

    monkeypatch.setattr(jvpreg.Linearization, "jvp", wrong_for_three)
    monkeypatch.setattr(scale_study, "AXES", {"probes": "probes"})
    summary = scale_study.STUDY.run(dataclasses.replace(config, folder=str(tmp_path), rounds=1))
    row = summary["axes"]["probes"]
    assert [point["jvpreg"]["status"] for point in row["points"]] == ["ok", "ok", "wrong"]
    last = row["points"][-1]["jvpreg"]
    assert last["error"] == pytest.approx(0.01, rel=1e-2)
    assert last["seconds"] is last["ratio"] is row["fits"]["jvpreg"] is None
    assert scale_study.columns("probes", row["points"][-1])["ms: f(x) and J u"] == "wrong"


def test_the_configuration_of_the_points_is_valid():
    file = CONFIGS / "benchmark_scale.yaml"
    _, config = parse("experiments benchmark", BENCHMARKS, ["scale", f"--config={file}", "--depth=2"])
    assert (config.depth, config.width, config.probes) == (2, 32, [1, 2, 4, 8, 16])
    with pytest.raises(ExperimentError, match="widths: expected three different values"):
        scale_study.STUDY.run(dataclasses.replace(config, widths=[4, 8, 8]))
