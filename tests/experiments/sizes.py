"""What the benchmarks' tests measure, as small as can be."""

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
