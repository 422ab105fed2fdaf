"""The keys of `verify`. Nothing here imports Keras, so that a typing error is told at once."""

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from experiments.kinds import PositiveFloat


@dataclass
class VerifyConfig:
    """Compare the products of whole architectures with autodiff in float64, on the backend that KERAS_BACKEND names."""

    zoo: Literal["applications", "keras_hub", "tutorials"] = "applications"
    """applications: whole architectures. keras_hub: its backbones, built small; they need `pip install 'jvpreg[zoo]'`.
    tutorials: what tutorials build, small."""

    only: list[str] | None = None
    """Names of the models, as their table has them; all of them by default."""

    jit: bool = True
    """Compile in float32 too: XLA on TensorFlow and JAX, torch.compile on Torch."""

    batch_size: PositiveInt = 2
    """Examples at which the Jacobians are taken."""

    time_limit: PositiveInt = 600
    """Seconds that an architecture may take; its row then says what was not measured."""

    tolerance: PositiveFloat = 1e-9
    """Relative error in float64 above which a row is wrong."""

    float32_tolerance: PositiveFloat = 1e-3
    """Relative error in float32 above which a row is wrong, if autodiff without jit stays below it."""

    seed: NonNegativeInt = 0
    """Seed of the weights, the inputs and the directions."""

    folder: str | None = None
    """Where the files go; by default runs/verify-BACKEND."""

    times: bool = False
    """Time a product of each model of a zoo beside the other ways to compute it. It needs a machine at rest."""

    resume: bool = False
    """Keep the rows of the folder that are ok, and measure only the others."""
