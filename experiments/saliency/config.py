"""The keys of `saliency`. Nothing here imports Keras, so that a typing error is told at once."""

from dataclasses import dataclass, field

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt


@dataclass
class SaliencyConfig:
    """Draw the saliency maps of a trained model, and compare them by what their pixels do to its outputs."""

    run: str = "runs/cifar10_vgg9/plain"
    """Folder of a finished `train` run, whose model and test images are used."""

    shown: PositiveInt = 8
    """Test images on the page."""

    examples: PositiveInt = 256
    """Test images for the curves: the first ones that the model classifies correctly."""

    fractions: list[ClosedUnitInterval] = field(default_factory=lambda: [0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0])
    """Fractions of the pixels that are removed, or kept."""

    batch_size: PositiveInt = 32
    """Images that are computed at once."""

    seed: NonNegativeInt = 0
    """Seed of the random map with which the others are compared."""

    folder: str = "runs/saliency"
    """Where the files go."""
