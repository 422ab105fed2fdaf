"""What a probe leaves behind in a long `fit`: nothing that grows. `python -m tests.long_run` is the long one."""

import keras
import pytest

from tests import long_run

EVERY = 10


@pytest.fixture(scope="module")
def rows():
    """Three measurements in each of two epochs."""
    return long_run.run(steps=6 * EVERY, every=EVERY, epochs=2)


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="nothing is traced")
@pytest.mark.parametrize("traced", ["step traces", "probe traces"])
def test_nothing_is_traced_after_the_first_measurement(traced, rows):
    assert rows[0][traced] > 0
    assert [row[traced] for row in rows] == [rows[0][traced]] * 6


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX alone tells what it compiles")
def test_nothing_is_compiled_after_the_first_epoch(rows):
    assert rows[0]["compilations"] > 0
    assert rows[5]["compilations"] == rows[3]["compilations"]


def test_no_objects_stay(rows):
    """No live object is left behind by a step, not even one."""
    assert rows[2]["objects"] - rows[1]["objects"] < EVERY
    assert rows[5]["objects"] - rows[4]["objects"] < EVERY
