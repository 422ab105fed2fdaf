"""The saliency study: what is removed and kept, and a small run of it."""

import json

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.saliency import study

IMAGE = np.arange(1.0, 5.0).reshape(1, 2, 2, 1)
MAP = np.array([[[0.1, 0.4], [0.3, 0.2]]])


@pytest.mark.parametrize(
    ("fraction", "kind", "expected"),
    [
        (0.25, "remove", [1, 0, 3, 4]),
        (0.5, "remove", [1, 0, 0, 4]),
        (0.5, "keep", [0, 2, 3, 0]),
        (0.0, "remove", [1, 2, 3, 4]),
        (0.0, "keep", [0, 0, 0, 0]),
        (1.0, "keep", [1, 2, 3, 4]),
    ],
)
def test_the_most_salient_pixels_go_first(fraction, kind, expected):
    received = study.disturbed(IMAGE, MAP, fraction, kind, color=np.zeros(1))
    np.testing.assert_array_equal(received.reshape(-1), expected)


def test_a_small_run(tmp_path, capsys):
    folder = tmp_path / "run"
    words = [
        "--model.name=vgg4",
        "--model.width=4",
        "--epochs=2",
        "--probe.examples=8",
        "--robustness.examples=8",
        "--wandb.mode=disabled",
        f"--folder={folder}",
    ]
    assert main(["train", *words]) == 0
    options = ["--shown=2", "--examples=6", "--fractions=[0.0, 0.5, 1.0]", f"--folder={tmp_path / 'maps'}"]
    assert main(["saliency", f"--run={folder}", *options]) == 0
    summary = json.loads((tmp_path / "maps" / "saliency.json").read_text())
    assert [row["method"] for row in summary["rows"]] == list(study.METHODS)
    for row in summary["rows"]:
        removed, kept = row["remove"]["mean"], row["keep"]["mean"]
        np.testing.assert_allclose([removed[0], removed[-1]], [kept[-1], kept[0]], rtol=1e-6)
        assert min(*removed, *kept) <= row["remove"]["area"] <= max(removed)
    for name in ("maps.png", "curves.png"):
        assert (tmp_path / "maps" / name).stat().st_size > 10_000
    assert "probability of the label" in capsys.readouterr().out


def test_a_folder_without_a_model(capsys, tmp_path):
    assert main(["saliency", f"--run={tmp_path}"]) == 2
    assert "there is no trained model in" in capsys.readouterr().err
