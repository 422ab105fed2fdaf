"""Backbones of keras-hub for text and sound, built small from keyword arguments."""

from typing import Any

import keras
from keras_hub import models

from experiments.verify.zoos import draws
from experiments.verify.zoos.member import Member

WORDS = 20
LENGTH = 6
SMALL: dict[str, Any] = {
    "vocabulary_size": WORDS,
    "num_layers": 2,
    "hidden_dim": 8,
    "intermediate_dim": 12,
}
"""Two heads of four numbers, so that the scale of the scores, 1/2, is the same number in any dtype."""

HEADS: dict[str, Any] = {**SMALL, "num_heads": 2}
SHARED_KEYS: dict[str, Any] = {**SMALL, "num_query_heads": 2, "num_key_value_heads": 1}

TOKENS = draws.named(token_ids=draws.whole(WORDS, LENGTH), padding_mask=draws.padding(LENGTH))
SEGMENTS = draws.named(
    token_ids=draws.whole(WORDS, LENGTH), padding_mask=draws.padding(LENGTH), segment_ids=draws.whole(2, LENGTH)
)
TWO_SENTENCES = draws.named(
    encoder_token_ids=draws.whole(WORDS, LENGTH),
    encoder_padding_mask=draws.padding(LENGTH),
    decoder_token_ids=draws.whole(WORDS, LENGTH),
    decoder_padding_mask=draws.padding(LENGTH),
)
SOUND = draws.named(
    encoder_features=draws.normal(8, 3),
    decoder_token_ids=draws.whole(WORDS, LENGTH),
    decoder_padding_mask=draws.padding(LENGTH),
)


def _backbone(name: str, inputs: draws.Draw, at: str | None = "token_embedding", **arguments: Any) -> Member:
    def make() -> keras.Model:
        return getattr(models, f"{name}Backbone")(**arguments)

    return Member(name, make, inputs, at)


MEMBERS = (
    _backbone("Bert", SEGMENTS, max_sequence_length=LENGTH, **HEADS),
    _backbone("Roberta", TOKENS, "embeddings", max_sequence_length=LENGTH, **HEADS),
    _backbone("DebertaV3", TOKENS, max_sequence_length=LENGTH, bucket_size=4, **HEADS),
    _backbone("Albert", SEGMENTS, embedding_dim=4, max_sequence_length=LENGTH, **HEADS),
    _backbone("GPT2", TOKENS, max_sequence_length=LENGTH, **HEADS),
    _backbone("Llama", TOKENS, **SHARED_KEYS),
    _backbone("Mistral", TOKENS, sliding_window=4, **SHARED_KEYS),
    _backbone("Mixtral", TOKENS, sliding_window=4, num_experts=3, top_k=2, **SHARED_KEYS),
    _backbone("Gemma", TOKENS, head_dim=4, **SHARED_KEYS),
    _backbone("Qwen", TOKENS, **SHARED_KEYS),
    _backbone("T5", TWO_SENTENCES, "encoder_embedding_dropout", **HEADS),
    _backbone("Bart", TWO_SENTENCES, "encoder_embeddings_add", max_sequence_length=LENGTH, **HEADS),
    _backbone(
        "Whisper",
        SOUND,
        at=None,
        num_mels=3,
        max_encoder_sequence_length=8,
        max_decoder_sequence_length=LENGTH,
        **HEADS,
    ),
)
