"""Several devices give what one gives. All cases run in one process, whose devices are made of the CPU."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from jvpreg import constraints, distillation, regularizers
from tests import distributed

ENFORCEMENTS = (constraints.Penalty, constraints.AugmentedLagrangian)
BASES = (regularizers.JacobianRegularizer, constraints.Constraint, distillation.MatchingLoss)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What differs, by case."""
    path = tmp_path_factory.mktemp("distributed") / "found.json"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={distributed.REPLICAS}"
    environment = {**os.environ, "XLA_FLAGS": flags}
    finished = subprocess.run(
        [sys.executable, "-m", "tests.distributed", str(path)],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras trains on one device with Torch")
@pytest.mark.parametrize("case", distributed.CASES)
def test_several_devices_give_what_one_gives(case, found):
    assert not found[case], "\n".join(found[case])


def test_every_regularizer_and_loss_has_a_row():
    exported = [getattr(module, name) for module in (regularizers, constraints) for name in module.__all__]
    kinds = (regularizers.JacobianRegularizer, *ENFORCEMENTS)
    names = {c.__name__ for c in exported if inspect.isclass(c) and issubclass(c, kinds) and c not in BASES}
    assert names == set(distributed.ROWS), "each needs a row in tests/distributed.py"
    losses = [getattr(distillation, name) for name in distillation.__all__]
    names = {c.__name__ for c in losses if issubclass(c, distillation.MatchingLoss) and c not in BASES}
    assert names == set(distributed.LOSSES), "each needs a row in tests/distributed.py"
