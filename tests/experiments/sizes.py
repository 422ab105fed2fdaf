"""The smallest settings with which the tests of the benchmarks can measure anything."""

import keras

from experiments.config import ModelConfig

SMALL = {
    "model": ModelConfig("mlp", 4),
    "image_size": 4,
    "batch_size": 4,
    "jit_compile": keras.backend.backend() == "jax",
    "rounds": 2,
    "warmup": 0,
}
