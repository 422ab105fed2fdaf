"""What is replaced in Keras while a call is traced: in one thread only, and put back at the end."""

from concurrent.futures import ThreadPoolExecutor

import keras
import pytest
from calls import Call
from compare import normal
from keras import layers, ops

import jvpreg
from jvpreg.common.keras_private import numpy_ops
from jvpreg.common.replaced import replaced


def test_another_thread_finds_keras_as_it_is():
    """While a call is traced, it may call a model, or build one."""
    other, found = layers.Dense(2), []
    other.build((None, 3))

    def at_work(x):
        symbol = keras.Input((3,))
        model = keras.Model(symbol, other(symbol))
        return isinstance(x, keras.KerasTensor), ops.is_tensor(other(ops.ones((1, 3)))), symbol == 1.0, model.built

    def call(x, w):
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(at_work, x).result())
        return x * x

    layer, x = Call(call), normal(2, 3).astype("float32")
    layer(x)
    jvpreg.linearize(layer, x, fallback="error")
    assert found[-1] == (True, True, False, True)


class Owner:
    def word(self):
        return "keras"


def test_two_threads_that_trace_at_once():
    by_keras = vars(Owner)["word"]
    first, second = (
        replaced([(Owner, "word", lambda before, self, name=name: f"{name}, {before(self)}")])
        for name in ("first", "second")
    )
    with ThreadPoolExecutor(1) as pool:
        first.__enter__()
        pool.submit(second.__enter__).result()
        assert (Owner().word(), pool.submit(Owner().word).result()) == ("first, keras", "second, keras")
        first.__exit__(None, None, None)
        assert (Owner().word(), pool.submit(Owner().word).result()) == ("keras", "second, keras")
        pool.submit(second.__exit__, None, None, None).result()
    assert vars(Owner)["word"] is by_keras


@pytest.mark.parametrize("fails", [False, True])
def test_all_is_put_back(fails):
    """Also after a call that raises in a trace, within which another one is traced."""
    inner, x = Call(lambda x, w: ops.matmul(x, w)), normal(2, 3).astype("float32")
    inner(x)
    seen = []

    def call(x, w):
        if isinstance(x, keras.KerasTensor):
            seen.append(jvpreg.linearize(inner, normal(2, 3).astype("float32"), fallback="error").outputs)
            if fails:
                raise KeyError("it takes no symbols")
        return x * x

    def owned():
        classes = keras.Operation.symbolic_call, keras.Layer.__call__, keras.Layer.symbolic_call
        shapes = [kind.compute_output_spec for kind in (numpy_ops.GetItem, numpy_ops.Repeat, numpy_ops.Einsum)]
        return [*classes, ops.scan, ops.cond, keras.KerasTensor.__eq__, *shapes, dir(keras.KerasTensor)]

    layer, before = Call(call), owned()
    layer(x)
    lin = jvpreg.linearize(layer, x, fallback="ignore")
    assert bool(lin.fallbacks) == fails
    assert seen
    assert all(ops.is_tensor(output) for output in seen)
    assert owned() == before
