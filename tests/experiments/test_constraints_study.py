"""The constraints study: its measures are what their names say, and a small run of each problem."""

import json

import keras
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.constraints import derivative, divergence, fitting, invariance, monotone
from experiments.constraints.config import ConstraintsConfig

SMALL = ["--steps=4", "--measurements=2", "--batch_size=8", "--width=4"]


def test_the_flow_has_no_divergence_and_the_gradient_is_one():
    places, size = np.random.default_rng(0).uniform(-1, 1, size=(50, 2)), 1e-6
    steps = size * np.eye(2)
    along = [(divergence.flow(places + step) - divergence.flow(places - step)) / (2 * size) for step in steps]
    np.testing.assert_allclose(along[0][:, 0] + along[1][:, 1], 0.0, atol=1e-8)
    assert np.abs(along[0][:, 0]).max() > 1
    slopes = [(derivative.values(places + s) - derivative.values(places - s))[:, 0] / (2 * size) for s in steps]
    np.testing.assert_allclose(derivative.gradient(places), np.stack(slopes, axis=1), atol=1e-7)


def test_the_largest_fall_is_that_of_a_function_that_is_known():
    split = monotone.patients(0)
    width = np.ptp(split["train"][0][:, 2])

    def falls(x):
        return -0.5 * x[:, 2]

    assert monotone.largest_fall(falls, split) == pytest.approx(0.5 * width, rel=1e-4)
    assert monotone.largest_fall(lambda x: x[:, 2] - x[:, 6], split) < 1e-6
    assert monotone.largest_fall(lambda x: x[:, 6], split) > 1


def test_monotone_boosting_is_monotone():
    split = monotone.patients(0)
    falls = {name: monotone.largest_fall(predict, split) for name, predict in monotone.boosting(split, 0).items()}
    assert falls["monotone boosting"] < 1e-9 < 0.1 < falls["boosting"]


def test_points_around_patients_follow_them():
    x = np.random.default_rng(0).normal(5.0, 1.0, size=(500, 3)).astype("float32")
    points = keras.ops.convert_to_numpy(monotone.around(x, keras.random.SeedGenerator(0)))
    assert points.shape == (2000, 3)
    np.testing.assert_allclose(points.mean(axis=0), x.mean(axis=0), atol=0.2)
    assert points.std() > x.std()


def test_examples_are_drawn_in_rounds():
    x, y = np.arange(5), {"a": np.arange(5) * 10}
    drawn, labels = fitting.repeated(x, y, np.random.default_rng(0))(12)
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(labels["a"], 10 * drawn)


def test_settings_have_names():
    config = ConstraintsConfig(strengths=[0.0, 2.0], rho=3.0)
    named = fitting.enforcements(config)
    assert list(named) == ["no constraint", "penalty 2", "augmented Lagrangian"]
    assert list(fitting.enforcements(ConstraintsConfig(strengths=[1.0], rho=None))) == ["penalty 1"]


@pytest.mark.parametrize(("problem", "seeds"), [("monotone", 1), ("divergence", 2), ("derivative", 1)])
def test_a_small_run(problem, seeds, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(monotone, "SWEEP", 3)
    words = [f"--problem={problem}", f"--folder={tmp_path}", "--strengths=[0,1]", "--points=8", "--examples=[4,8]"]
    words.append(f"--seeds={seeds}")
    assert main(["constraints", *SMALL, *words]) == 0
    summary = json.loads((tmp_path / f"{problem}.json").read_text())
    expected = ["no constraint", "penalty 1", "augmented Lagrangian"]
    if problem == "derivative":
        expected = [f"{name}, {number} points" for number in (4, 8) for name in expected]
    elif problem == "monotone":
        expected += ["boosting", "monotone boosting"]
    assert list(summary["runs"]) == expected
    for figures in summary["runs"].values():
        assert figures["error"]["mean"] > 0
        assert (figures["error"]["sem"] or 0) > 0 or seeds == 1
    curve = summary["runs"]["no constraint"]["curves"] if problem != "derivative" else []
    assert all(one["steps"] == [0, 2, 4] and len(one["violation"]) == 3 for one in curve)
    assert (tmp_path / f"{problem}.png").stat().st_size > 10_000
    assert f"errors of {seeds} seeds" in capsys.readouterr().out


def test_a_small_run_on_images(tmp_path, monkeypatch):
    monkeypatch.setattr(invariance, "TIMED_STEPS", 2)
    monkeypatch.setattr(invariance, "EXAMPLES", 32)
    words = ["--problem=invariance", "--strengths=[0,0.1]", "--rho=null", "--model.width=2", "--data.train_examples=40"]
    assert main(["constraints", *SMALL, *words, "--seeds=1", f"--folder={tmp_path}"]) == 0
    runs = json.loads((tmp_path / "invariance.json").read_text())["runs"]
    assert list(runs) == ["no constraint", "no constraint, as long", "augmentation", "penalty 0.1"]
    assert runs["penalty 0.1"]["steps"]["mean"] == 4
    for figures in runs.values():
        assert all(0 <= figures[kind]["mean"] <= 100 for kind in ("clean", "rotated", "shifted", "both"))
    assert (tmp_path / "invariance.png").stat().st_size > 10_000


def test_images_are_moved_by_no_more_than_they_may():
    config = ConstraintsConfig(angle=90.0, shift=1.0)
    image = np.zeros((200, 9, 9, 1), "float32")
    image[:, 4, 4] = 1.0
    turned = invariance.moved(image, config, np.random.default_rng(0), "rotation")
    np.testing.assert_allclose(turned[:, 4, 4], 1.0, atol=1e-5)
    shifted = invariance.moved(image, config, np.random.default_rng(0), "shift")
    assert np.abs(shifted[:, 4, 4]).min() < 0.9
    assert np.abs(shifted[:, :2]).max() == 0


def test_nothing_to_enforce_is_an_error(capsys):
    assert main(["constraints", "--strengths=[0]", "--rho=null"]) == 2
    assert "strengths: expected one above 0, or a rho" in capsys.readouterr().err
