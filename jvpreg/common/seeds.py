"""Seeds whose draws are independent: neighbouring seeds, and the seeds of the parts of one model."""

import keras
import numpy as np
from keras import ops

from jvpreg.common.typing import Seed


def generator(seed: int | None, use: int = 0) -> keras.random.SeedGenerator:
    """A generator for one of several uses of a user's seed.

    Args:
        seed: an integer, or None for one that Keras draws.
        use: the number of the use. No two uses share a draw with each other, or with anything else of the same seed.
    """
    # Keras refuses what is not an integer.
    return independent(keras.random.SeedGenerator(derived(seed, use) if isinstance(seed, int) else seed))


def derived(seed: int, use: int) -> int:
    """An integer seed for one of several uses of a seed."""
    return _hash(seed, use, 1)  # three numbers, so that it is none of a generator's own draws


def independent(seed: Seed) -> Seed:
    """The same seed or generator for `keras.random`, but none of its draws is a later draw of a neighbouring seed.

    Keras seeds Torch with the sum of a generator's seed and its count, so that draw i + 1 of seed 0 would be draw i of
    seed 1. On TensorFlow and JAX both numbers are the key, and the generator itself is returned.
    """
    if isinstance(seed, np.integer):
        seed = int(seed)
    if keras.backend.backend() != "torch" or isinstance(seed, _Hashed):
        return seed
    if isinstance(seed, keras.random.SeedGenerator):
        return _Hashed(seed)
    return _hash(seed, 0)  # as the first draw of a generator


class _Hashed(keras.random.SeedGenerator):
    """A generator with the state of another one. What it returns is a hash of both numbers of this state."""

    def __init__(self, generator: keras.random.SeedGenerator):
        self.__dict__.update(vars(generator))
        self._generator = generator

    def next(self, ordered: bool = True) -> np.ndarray:
        """The next seed for Keras, on the host, where Torch's generators take it."""
        seed, count = ops.convert_to_numpy(self._generator.next(ordered)).tolist()
        return np.array([_hash(seed, count), 0])


def _hash(*numbers: int) -> int:
    """31 bits of several numbers, which fit the integers that each backend has for seeds."""
    words = [number % 2**64 for number in numbers]
    return int(np.random.SeedSequence(words).generate_state(1)[0]) >> 1
