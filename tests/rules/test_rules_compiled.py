"""Every rule once more, compiled: its first row in the table, which `test_rules.py` checks as a whole."""

import keras
import pytest
from cases import first_rows, skip_if_unavailable

import jvpreg


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch.compile takes half a minute a row")
@pytest.mark.parametrize("case", first_rows(), ids=lambda case: case.id)
def test_rule_compiled(case):
    skip_if_unavailable(case)
    if case.random and keras.backend.backend() == "tensorflow":
        pytest.skip("under XLA, TensorFlow draws other numbers from the same seed")
    jvpreg.testing.check_rule(case.make(), case.input_shape, jit=True, **case.arguments)
