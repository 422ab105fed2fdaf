"""The keys of the study. Nothing here imports Keras, so that a typing error is told at once."""

from dataclasses import dataclass, field

from jsonargparse.typing import NonNegativeInt, PositiveInt


@dataclass
class EstimatorsConfig:
    """Draw the convergence of the estimators: figure 4 of Balestriero & Baraniuk (2021), and the trace's."""

    image_size: PositiveInt = 16
    """Height and width of the UNet's images of 3 channels, in and out; a multiple of 4. Its Jacobian is materialized
    for the exact values."""

    examples: PositiveInt = 4
    """Images at which the largest singular value and eigenvalue are computed."""

    block: PositiveInt = 30
    """How many singular values and eigenvalues are computed at once, beside one."""

    block_examples: PositiveInt = 2
    """Images at which that many are computed; the first ones."""

    steps: list[PositiveInt] = field(default_factory=lambda: [1, 2, 3, 5, 7, 10])
    """Numbers of steps after which the iterations are compared."""

    single_steps: PositiveInt = 20
    """The largest number of steps for one value, which are cheap: every fifth up to it is added to those above."""

    timed_examples: PositiveInt = 10
    """Images at which ten steps for one value are timed; a tenth of them for a block. The paper has 100."""

    num_probes: PositiveInt = 100
    """Random vectors of each trajectory of the Frobenius norm."""

    trajectories: PositiveInt = 8
    """Trajectories that are drawn; 32 times as many are evaluated."""

    trace_dimension: PositiveInt = 300
    """Size of the matrices with a known spectrum."""

    trace_matvecs: list[PositiveInt] = field(default_factory=lambda: [12, 24, 36, 48, 60, 90, 120])
    """Products that each estimate of the trace may spend; multiples of 6 suit every method."""

    trace_seeds: PositiveInt = 400
    """Independent estimates of each kind."""

    seed: NonNegativeInt = 0
    """Seed of the weights, the images and the directions."""

    folder: str | None = None
    """Where the files go; by default runs/estimators-BACKEND."""
