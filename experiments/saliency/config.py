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
    """Test images for the curves, the first that the model gets right."""

    fractions: list[ClosedUnitInterval] = field(default_factory=lambda: [0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0])
    """Parts of the pixels that are removed, or kept."""

    batch_size: PositiveInt = 32
    """Images at once."""

    seed: NonNegativeInt = 0
    """Of the random map that the others are held against."""

    folder: str = "runs/saliency"
    """Where the files go."""
