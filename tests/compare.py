"""Random numbers and comparisons that several test modules share."""

import keras
import numpy as np
from keras import ops, tree

numpy = ops.convert_to_numpy
JAX = keras.backend.backend() == "jax"
"""JAX compiles for seconds, where the other backends start at once."""


def at_once(function):
    """On JAX, `function` compiled as one; elsewhere, `function` itself.

    JAX' eager mode compiles every operation for every shape, which takes 25 s for a model. `conftest.py` turned XLA's
    optimizations off, so the compiled function runs the same operations as eager mode would.
    """
    if not JAX:
        return function
    import jax

    return jax.jit(function)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def randomize(model, seed=0):
    random = np.random.default_rng(seed)
    for variable in model.variables:
        if "seed" not in variable.path:
            low = 0.5 if "variance" in variable.path else -0.8
            variable.assign(random.uniform(low, low + 1.6, size=variable.shape))
    return model


def norm(tensors):
    return np.sqrt(sum(np.sum(np.square(numpy(t))) for t in tree.flatten(tensors)))


def inner(left, right):
    return sum(np.sum(numpy(a) * numpy(b)) for a, b in zip(tree.flatten(left), tree.flatten(right), strict=True))


def assert_close(received, expected, tolerance=1e-10):
    received, expected = tree.flatten(received), tree.flatten(expected)
    assert len(received) == len(expected) > 0
    for a, b in zip(received, expected, strict=True):
        a, b = numpy(a), numpy(b)
        assert a.shape == b.shape
        assert norm(a - b) <= tolerance * max(norm(b), 1e-30)


def attention_written_out(query, key, value, bias=None, mask=None, scale=None, is_causal=False, **_):
    """Attention with a softmax in float64 (JAX' is in float32). A row that is all masked has no tangent."""
    key, value = (ops.repeat(heads, query.shape[2] // heads.shape[2], axis=2) for heads in (key, value))
    logits = ops.einsum("btnh,bsnh->bnts", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    mask = True if mask is None else mask
    if is_causal:
        mask = ops.logical_and(mask, np.tri(query.shape[1], key.shape[1]) > 0)
    return ops.einsum("bnts,bsnh->btnh", ops.softmax(ops.where(mask, logits, -1e30)), value)


def without_rounded_attention(monkeypatch):
    """Keras' attention with a softmax in float64 on JAX, whose own is in float32: differences of outputs need it."""
    if JAX:
        monkeypatch.setattr("keras.src.backend.nn.dot_product_attention", attention_written_out)
