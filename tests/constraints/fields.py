"""Hand-made models with known Jacobians, and what a constraint charges for them."""

import keras
import numpy as np
from keras import layers, ops

import jvpreg
from jvpreg.regularizers.serving import serve


def linear(matrix):
    """`x ↦ A x`, whose Jacobian is A `(K, D)` everywhere."""
    matrix = np.asarray(matrix, "float64")
    model = keras.Sequential([keras.Input((matrix.shape[1],)), layers.Dense(matrix.shape[0], use_bias=False)])
    model.set_weights([matrix.T])
    return model


def points(count=5, size=2, seed=0):
    return np.random.default_rng(seed).normal(size=(count, size)).astype(keras.config.floatx())


def outcome(constraint, model, x, labels=None, carried=None):
    """The outcome of one constraint at `x`: its penalty, its sums for the carried state, and its measures."""
    lin = jvpreg.linearize(model, x)
    constraint.check(lin.inputs[0], lin.outputs)
    seed = keras.random.SeedGenerator(0)
    return serve([constraint], lin, seed, labels=[labels], carried=[carried]).outcomes()[0]


def violations(constraint, model, x, labels=None):
    """The violations of a constraint at `N` points, in `C` components: `(N, C)`."""
    return jvpreg.constraints.verify(model, constraint, x, labels).components


def numbers(tensor):
    return ops.convert_to_numpy(tensor)
