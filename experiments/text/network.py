"""A small transformer encoder of Keras' own layers."""

import keras
import numpy as np
from keras import layers, ops

from experiments.text.config import TextConfig
from experiments.text.grammar import LENGTH, WORDS

EMBEDDING = "token_embedding"
"""The path of the layer by whose output derivatives are taken."""


def network(config: TextConfig) -> keras.Model:
    """Tokens `(B, LENGTH)` to a logit `(B, 1)`, above 0 for praise. What fills up a sentence is masked."""
    tokens = keras.Input((LENGTH,), dtype="int32", name="tokens")
    x = layers.Embedding(len(WORDS), config.width, mask_zero=True, name=EMBEDDING)(tokens)
    # Places count from 1, so that 0 is that of what fills up: a sum has a mask only if both its terms have one.
    places = ops.cast(tokens > 0, "int32") * np.arange(1, LENGTH + 1, dtype="int32")
    x = layers.Add()([x, layers.Embedding(LENGTH + 1, config.width, mask_zero=True, name="place_embedding")(places)])
    for _ in range(config.blocks):
        normalized = layers.LayerNormalization()(x)
        attention = layers.MultiHeadAttention(config.heads, config.width // config.heads)
        x = layers.Add()([x, attention(normalized, normalized)])
        hidden = layers.Dense(2 * config.width, activation="gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(config.width)(hidden)])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(tokens, layers.Dense(1, name="logit")(x))
