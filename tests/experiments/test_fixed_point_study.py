"""The fixed-point study: the steps whose memory is measured, and a small run of the whole study."""

import json

import keras
import numpy as np

from experiments.__main__ import main
from experiments.fixed_point import network

SMALL = [
    "--width=4",
    "--data.train_examples=40",
    "--epochs=1",
    "--batch_size=20",
    "--probed=2",
    "--evaluated=8",
    "--max_iterations=8",
    "--tolerances=[0.01,0.0001]",
    "--depths=[2]",
    "--memory_batch_size=2",
]


def test_an_unrolled_network_comes_to_the_same_fixed_point():
    images = np.random.default_rng(0).random((2, 8, 8, 3), dtype="float32")
    logits = []
    for arguments in ({"unrolled": 60}, {"tolerance": 1e-6, "max_iterations": 60, "unconverged": "ignore"}):
        keras.utils.set_random_seed(0)
        model = network.build((8, 8, 3), 10, 4, **arguments)
        cell = model.get_layer("cell") if "unrolled" in arguments else model.get_layer(network.LAYER).cell
        norm = cell.get_layer("norm")
        norm.gamma.assign(0.3 * norm.gamma)  # so that plain iteration converges
        logits.append(keras.ops.convert_to_numpy(model(images)))
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)


def test_a_small_run(tmp_path, capsys):
    assert main(["fixed_point", *SMALL, f"--folder={tmp_path}"]) == 0
    summary = json.loads((tmp_path / "fixed_point.json").read_text())
    assert [one["strength"] for one in summary["runs"]] == [0.0, 0.001]
    for one in summary["runs"]:
        assert 1 <= one["history"]["equilibrium/iterations"][0] <= 8
        assert one["history"]["jacobian/radius"][0] > 0
    errors = {(row["adjoint_solver"], row["tolerance"]): row["error"] for row in summary["gradients"]}
    assert errors["gmres", 0.0001] < errors["gmres", 0.01] < 1
    assert [row["kind"] for row in summary["memory"]] == ["fixed point", "fixed point, picard", "unrolled"]
    assert all(row["bytes"] > 0 for row in summary["memory"])
    assert (tmp_path / "fixed_point.png").stat().st_size > 10_000
    assert "adjoints unconverged" in capsys.readouterr().out
