"""The loop of docs/many-devices.md for Torch, as it is printed: two processes train to the weights of one."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def weights_of(count: int, script: Path) -> list[np.ndarray]:
    path, port = script.parent / f"{count}.npz", free_port()
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, script, path],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
    return list(np.load(path).values())


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="it is Torch's own way")
def test_two_processes_train_to_the_weights_of_one(tmp_path):
    (code,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/many-devices.md").read_text(), re.DOTALL)
        if "DistributedDataParallel(" in block
    ]
    script = tmp_path / "train.py"
    script.write_text(code)
    one, two = weights_of(1, script), weights_of(2, script)
    assert len(one) == 4
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
