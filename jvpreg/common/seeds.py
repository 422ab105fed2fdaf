"""Seeds whose draws have nothing in common: neighbouring ones, and those of the parts of one model."""

import keras
import numpy as np
from keras import ops


def generator(seed: int | None, use: int = 0) -> keras.random.SeedGenerator:
    """A generator for one of the uses that a user's seed has.

    Args:
        seed: an integer, or None for one that Keras draws.
        use: which of them: no two share a draw, nor does one with what else was given the same seed.
    """
    # What is no integer is Keras' to refuse.
    return independent(keras.random.SeedGenerator(derived(seed, use) if isinstance(seed, int) else seed))


def derived(seed: int, use: int) -> int:
    """The seed of one of the uses that a whole seed has."""
    return _hash(seed, use, 1)  # three numbers, so that it is none of a generator's own draws


def independent(seed):
    """The same seed or generator for `keras.random`, such that no draw of it is a later one of a neighbouring seed.

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
    """Another generator, by whose state it draws and is saved: what it returns is a hash of both of its numbers."""

    def __init__(self, generator: keras.random.SeedGenerator):
        self.__dict__.update(vars(generator))
        self._generator = generator

    def next(self, ordered: bool = True):
        """The next seed for Keras, on the host, where Torch's generators take it."""
        seed, count = ops.convert_to_numpy(self._generator.next(ordered)).tolist()
        return np.array([_hash(seed, count), 0])


def _hash(*numbers: int) -> int:
    """31 bits of several numbers, which fit the integers that each backend has for seeds."""
    words = [number % 2**64 for number in numbers]
    return int(np.random.SeedSequence(words).generate_state(1)[0]) >> 1
