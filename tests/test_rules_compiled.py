"""Every rule once more, compiled: its first row in the table, which `test_rules.py` checks as a whole."""

import keras
import pytest
from cases import LAYERS, skip_if_unavailable

import jvpreg
from jvpreg.registry import _RULES

WINDOWS = ("jvpreg.rules.convolution", "jvpreg.rules.pooling")


def rows():
    """The first row of each rule, since others run the same code; on TensorFlow, every row that XLA may treat apart.

    These are windows, where it has kernels of its own, and layers without a rule, which are opened up.
    """
    chosen = {}
    for case in LAYERS:
        rule = _RULES.get(case.operation)
        key = rule and rule.function
        if keras.backend.backend() == "tensorflow" and (rule is None or key.__module__ in WINDOWS):
            key = case.id
        if case.compiled:
            chosen.setdefault(key, case)
    assert len(chosen) > 80
    return list(chosen.values())


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch.compile takes half a minute a row")
@pytest.mark.parametrize("case", rows(), ids=lambda case: case.id)
def test_rule_compiled(case):
    skip_if_unavailable(case)
    if case.random and keras.backend.backend() == "tensorflow":
        pytest.skip("under XLA, TensorFlow draws other numbers from the same seed")
    jvpreg.testing.check_rule(case.make(), case.input_shape, jit=True, **case.arguments)
