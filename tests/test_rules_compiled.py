"""Every rule once more, compiled: in a file of its own, so that the two go to different processes."""

import keras
import pytest
from cases import LAYERS, skip_if_unavailable

import jvpreg


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch.compile takes half a minute a row")
@pytest.mark.parametrize("case", [case for case in LAYERS if case.compiled], ids=lambda case: case.id)
def test_rule_compiled(case):
    skip_if_unavailable(case)
    if case.random and keras.backend.backend() == "tensorflow":
        pytest.skip("under XLA, TensorFlow draws other numbers from the same seed")
    jvpreg.testing.check_rule(case.make(), case.input_shape, jit=True, **case.arguments)
