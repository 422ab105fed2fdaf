"""The keys of `text`. Nothing here imports Keras, so that a typing error is told at once."""

from dataclasses import dataclass, field

from jsonargparse.typing import NonNegativeInt, PositiveInt

from experiments.kinds import NonNegativeFloat, PositiveFloat


@dataclass
class TextConfig:
    """Train a small transformer to tell praise from blame, with and without a penalty by its token embeddings."""

    strengths: list[NonNegativeFloat] = field(default_factory=lambda: [0.0, 0.0001, 0.001])
    """Strengths of the penalty, which is the mean of `‖J‖_F²` of the logit by what the token embedding returned; a row
    for each, and 0 is no penalty."""

    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the sentences, the weights and the batches."""

    train_examples: PositiveInt = 1000
    """Sentences that are trained on."""

    test_examples: PositiveInt = 1000
    """Other sentences of the same grammar."""

    epochs: PositiveInt = 20
    """Passes over the sentences."""

    batch_size: PositiveInt = 32
    """Sentences in each step."""

    width: PositiveInt = 32
    """Numbers of each token's embedding."""

    blocks: PositiveInt = 2
    """Blocks of attention and two dense layers."""

    heads: PositiveInt = 2
    """Heads of each attention."""

    learning_rate: PositiveFloat = 0.002
    """Of Adam at the first step; it falls to zero along a cosine."""

    probed: PositiveInt = 128
    """Test sentences of the probe in the logs."""

    shown: PositiveInt = 6
    """Test sentences in the figure of the first seed."""

    folder: str = "runs/text"
    """Where the files go; cells that it holds are not trained again."""
