"""The GAN study: its distance, its pictures, and a small run."""

import json

import numpy as np

from experiments.__main__ import main
from experiments.gan import report, study


def test_the_distance_between_normal_distributions():
    random = np.random.default_rng(0)
    one = random.normal(size=(50, 3))
    np.testing.assert_allclose(study.frechet_distance(one, one + np.array([3.0, 0.0, 4.0])), 5.0, rtol=1e-6)
    # Twice as wide: the distance is the root of the trace of the covariance.
    wide = 2 * one - one.mean(axis=0)
    expected = np.sqrt(np.trace(np.cov(one, rowvar=False)))
    np.testing.assert_allclose(study.frechet_distance(one, wide), expected, rtol=1e-6)
    assert study.frechet_distance(np.zeros((4, 3)), one) > 0  # a covariance of 0


def test_a_page_of_pictures():
    strings = [digit * 64 for digit in "5f3"]
    page = report.sheet(strings)
    assert page.shape == (20, 20)
    assert [page[1, 1], page[1, 11], page[11, 1], page[11, 11]] == [5, 15, 3, 0]
    assert page.sum() == 64 * 23


def test_a_small_run(tmp_path, capsys):
    words = ["gan", "--epochs=2", "--critic_steps=1", "--batch_size=250", "--width=16", "--snapshots=2", "--shown=4"]
    assert main([*words, "--strengths=[0, 10]", "--learning_rate=0.01", "--seeds=[0]", f"--folder={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "gan.json").read_text())["rows"]
    free, held = (row["results"][0] for row in rows)
    assert free["epochs"] == held["epochs"] == [0, 1, 2]
    # Both begin as one network, and the penalty alone holds the gradient.
    assert free["pictures"][0] == held["pictures"][0] != held["pictures"][-1]
    assert free["norm"][0] == held["norm"][0]
    assert abs(held["norm"][-1] - 1) < abs(free["norm"][-1] - 1)
    assert {file.name for file in tmp_path.iterdir()} == {"cells", "curves.png", "digits.png", "gan.json", "gan.md"}
    assert "penalty 10" in capsys.readouterr().out
