"""`train --devices=N`: the same numbers as on one device, and errors that name the key."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest

from experiments import devices
from experiments.config import ProbeConfig, TrainConfig
from experiments.errors import ExperimentError

BACKEND = keras.backend.backend()
LAYOUTS = {"tensorflow": [None], "jax": [None, {".*kernel": [None, "model"]}], "torch": []}[BACKEND]


@pytest.mark.every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_devices_give_what_one_gives(layout, tmp_path):
    finished = subprocess.run(
        [sys.executable, "-m", "tests.experiments.devices", str(tmp_path), json.dumps(layout)],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    two, one = json.loads((tmp_path / "found.json").read_text())
    assert "jacobian/frobenius_norm" in one
    assert "weight 0" in one
    assert two.keys() == one.keys()
    for key, value in one.items():
        np.testing.assert_allclose(two[key], value, rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 127}, r"--batch_size=127 cannot be divided by --devices=2"),
        ({"probe": ProbeConfig(examples=5)}, r"--probe.examples=5 cannot be divided by --devices=2"),
        ({"devices": 1, "layout": {"kernel": ["model"]}}, r"--layout .*KERAS_BACKEND=jax and --devices=N"),
        ({"layout": {"(": ["model"]}}, r"'\(' is no regular expression"),
        ({"layout": {"kernel": ["rows"]}}, r"null or \"model\". Received: 'rows'"),
    ],
)
def test_keys_that_do_not_fit(changes, message, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ExperimentError, match=message):
        devices.check(replace(TrainConfig(devices=2), **changes))


def test_torch_is_told_of_its_own_way(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(ExperimentError, match=r"--devices=2: Keras trains on one device on Torch.*many-devices.md"):
        devices.check(TrainConfig(devices=2))
