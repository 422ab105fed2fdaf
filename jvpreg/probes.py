"""Random directions with `E[u uᵀ] = I`, so that `E‖J u‖² = ‖J‖_F²`."""

import math
from collections.abc import Callable

import keras
from keras import ops, tree

from jvpreg.common import checks, replicas, seeds
from jvpreg.common.dtypes import widest_dtype
from jvpreg.common.eager import cast
from jvpreg.common.typing import DType, Seed, Structure, Tensor


def draw(kind: str, like: Structure, num_probes: int, seed: Seed) -> Structure:
    """Draws directions for each example.

    Args:
        kind: `"gaussian"`, `"rademacher"`, `"sphere"` (radius √D) or `"orthogonal"` (P orthogonal vectors of length
            √D an example; with P = D their mean square is exact, not an estimate).
        like: a tensor `(B, …)`, or a structure of them: the space of the directions, of dimension D an example.
        num_probes: P.
        seed: an integer or a `keras.random.SeedGenerator`.

    Returns:
        Directions like `like`, with a leading probe axis: `(P, B, …)`, in float32 at least.

    Raises:
        ValueError: the kind is unknown, or P orthogonal directions do not fit.

    Reference: Balestriero & Baraniuk (2021), equation 13; the variances are in the class docstring of
    `jvpreg.regularizers.JacobianNorm`.

    Example:

    >>> import numpy as np, jvpreg
    >>> tuple(jvpreg.probes.draw("sphere", np.zeros((4, 3)), num_probes=2, seed=0).shape)
    (2, 4, 3)
    """
    checks.choice("kind", kind, KINDS)
    num_probes = checks.count("num_probes", num_probes)
    checks.seed("seed", seed, generator=True)
    tensors = _spaces(like)
    size, dtype = dimension(tensors), widest_dtype(tensors)
    if kind == "orthogonal" and num_probes > size:
        raise ValueError(
            f"Invalid value for argument `num_probes`. Expected at most {size}, the dimension of the space, "
            f"for orthogonal probes. Received: num_probes={num_probes}"
        )
    # Replicas draw for the whole batch, so that each example gets the directions that one device would give it.
    examples = ops.shape(tensors[0])[0]
    batch, start = replicas.part_of_batch(examples)
    vectors = replicas.own_part(KINDS[kind]((num_probes, batch, size), dtype, seed), examples, start, axis=1)
    return split(vectors, tree.pack_sequence_as(like, tensors))


def basis(like: Structure) -> Structure:
    """The D canonical basis vectors, the same for each example: `(D, B, …)`.

    Args:
        like: a tensor `(B, …)`, or a structure of them, with D entries an example.

    Returns:
        Directions like `like`, with a leading axis.

    Example:

    >>> import numpy as np, jvpreg
    >>> tuple(jvpreg.probes.basis(np.zeros((4, 3))).shape)
    (3, 4, 3)
    """
    tensors = _spaces(like)
    size, dtype = dimension(tensors), widest_dtype(tensors)
    vectors = ops.eye(size, dtype=dtype)
    shape = (size, ops.shape(tensors[0])[0], size)
    vectors = ops.broadcast_to(ops.expand_dims(vectors, 1), shape)
    return split(vectors, tree.pack_sequence_as(like, tensors))


def _spaces(like: Structure) -> list:
    tensors = [checks.tensor("like", x) for x in tree.flatten(like)]
    if not tensors or any(len(tensor.shape) == 0 or 0 in tuple(tensor.shape) for tensor in tensors):
        raise checks.invalid("like", "tensors (B, …) with one entry an example at least", like)
    return tensors


def dimension(like: Structure) -> int:
    """D, the number of entries an example of a structure of tensors `(B, …)` has."""
    sizes = [math.prod(x.shape[1:]) if None not in x.shape[1:] else None for x in tree.flatten(like)]
    if None in sizes:
        raise ValueError(
            "Invalid value for argument `like`. Expected shapes that are known, except the batch. "
            f"Received: {[tuple(x.shape) for x in tree.flatten(like)]}"
        )
    return sum(sizes)  # type: ignore[arg-type]


def split(vectors: Tensor, like: Structure) -> Structure:
    """Vectors `(P, B, D)` as directions like `like`, with a leading probe axis: `(P, B, …)`, in float32 at least."""
    parts, start = [], 0
    for tensor in tree.flatten(like):
        size = dimension(tensor)
        part = vectors[:, :, start : start + size] if size < vectors.shape[-1] else vectors
        part = cast(part, widest_dtype([tensor]))
        parts.append(ops.reshape(part, (vectors.shape[0], *ops.shape(tensor))))
        start += size
    return tree.pack_sequence_as(like, parts)


def _random(distribution: str, shape: tuple, dtype: DType, seed: Seed) -> Tensor:
    """As `keras.random.normal` and `keras.random.uniform`, but on TensorFlow by the same generator under XLA."""
    if keras.backend.backend() != "tensorflow":
        return getattr(keras.random, distribution)(shape, dtype=dtype, seed=seeds.independent(seed))
    import tensorflow as tf

    # By itself, XLA uses Threefry on a CPU: 44 ms for the probes of 64 CIFAR images on two cores; Philox takes 2.
    state = seed.next() if isinstance(seed, keras.random.SeedGenerator) else tf.constant([seed, 0], "int64")
    state = tf.cast(tf.math.floormod(state, tf.int32.max - 1), "int32")
    return getattr(tf.random, f"stateless_{distribution}")(shape, state, dtype=dtype, alg="philox")


def _gaussian(shape: tuple, dtype: DType, seed: Seed) -> Tensor:
    return _random("normal", shape, dtype, seed)


def _rademacher(shape: tuple, dtype: DType, seed: Seed) -> Tensor:
    return ops.where(_random("uniform", shape, "float32", seed) < 0.5, ops.ones((), dtype), -ops.ones((), dtype))


def _sphere(shape: tuple, dtype: DType, seed: Seed) -> Tensor:
    vectors = _gaussian(shape, dtype, seed)
    return vectors * (math.sqrt(shape[-1]) / ops.norm(vectors, axis=-1, keepdims=True))


def _orthogonal(shape: tuple, dtype: DType, seed: Seed) -> Tensor:
    num_probes, batch, size = shape
    # The Q of a Gaussian matrix is uniform over all rotations once R has a positive diagonal (Mezzadri, 2007).
    # LAPACK gives R other signs, and then the directions have a mean that is not zero.
    columns, triangle = ops.qr(_gaussian((batch, size, num_probes), dtype, seed))
    columns = columns * ops.expand_dims(ops.sign(ops.diagonal(triangle, axis1=1, axis2=2)), 1)
    return math.sqrt(size) * ops.transpose(columns, (2, 0, 1))


KINDS: dict[str, Callable] = {
    "gaussian": _gaussian,
    "rademacher": _rademacher,
    "sphere": _sphere,
    "orthogonal": _orthogonal,
}
