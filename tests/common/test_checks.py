"""Checks of arguments: which values pass and what they become, which are refused, and in which words."""

import math

import keras
import numpy as np
import pytest

from jvpreg.common import checks


@pytest.mark.parametrize(
    ("check", "value", "kept"),
    [
        (lambda v: checks.count("n", v), np.int64(3), 3),
        (lambda v: checks.count("n", v, least=0), 0, 0),
        (lambda v: checks.count("n", v, optional=True), None, None),
        (lambda v: checks.number("n", v, least=0), np.float32(0.5), 0.5),
        (lambda v: checks.number("n", v, above=0, finite=False), math.inf, math.inf),
        (lambda v: checks.boolean("n", v), np.True_, True),
        (lambda v: checks.choice("n", v, (1, 2, "inf")), np.int32(2), 2),
        (lambda v: checks.choice("n", v, ("a", None)), None, None),
        (lambda v: checks.paths("n", v), ("a", "b/c"), ["a", "b/c"]),
        (lambda v: checks.seed("n", v), np.uint8(7), 7),
    ],
)
def test_what_is_kept_is_plain(check, value, kept):
    assert check(value) == kept
    assert type(check(value)) is type(kept)


@pytest.mark.parametrize(
    ("check", "values", "expected"),
    [
        (
            lambda v: checks.count("n", v),
            (0, -1, 1.5, 2.0, True, None, "2", [2], np.array([2]), math.nan),
            "an integer, 1 or more",
        ),
        (lambda v: checks.count("n", v, most=4, optional=True), (5, 0, False), "an integer from 1 to 4, or None"),
        (
            lambda v: checks.number("n", v, least=0),
            (-0.1, math.nan, math.inf, True, None, "0.1", 1j, [1.0], np.zeros(1)),
            "a finite number, 0 or more",
        ),
        (lambda v: checks.number("n", v, above=0, most=1), (0, 1.1), "a finite number above 0, at most 1"),
        (lambda v: checks.number("n", v, above=1, finite=False), (1, math.nan), "a number above 1"),
        (lambda v: checks.boolean("n", v), (1, 0, "no", None, np.zeros(1)), "True or False"),
        (lambda v: checks.choice("n", v, ("a", 1, None)), ("b", True, 1.0, ["a"], np.array(["a"])), '"a", 1 or None'),
        (lambda v: checks.text("n", v), ("", 3, None, b"x"), "a string that is not empty"),
        (lambda v: checks.paths("n", v), ("a", [1], [""], None, {"a"}), "a list of paths of layers"),
        (lambda v: checks.paths("n", v), (["a", "a"],), "each of them once"),
        (lambda v: checks.function("n", v, "a function of x"), (None, "f"), "a function of x"),
        (
            lambda v: checks.seed("n", v, generator=True),
            (-1, 0.5, True, None, "s"),
            "an integer, 0 or more, or a `keras.random.SeedGenerator`",
        ),
    ],
)
def test_what_is_refused_names_argument_expectation_and_value(check, values, expected):
    for value in values:
        with pytest.raises(ValueError, match="Invalid value") as raised:
            check(value)
        received = str(raised.value)
        assert received.startswith(f"Invalid value for argument `n`. Expected {expected}. Received: n="), received


def test_a_large_value_is_told_in_short():
    for value in (np.zeros((300, 300)), keras.ops.zeros((300, 300))):
        received = str(checks.invalid("x", "less", value))
        assert "of shape (300, 300) and dtype" in received
        assert len(received) < 200
    assert len(str(checks.invalid("x", "less", list(range(1000))))) < checks.LONGEST + 100
    assert "`x` of Box" in str(checks.invalid("x", "less", 1, owner="Box"))
