"""Penalties on the input-output Jacobian itself."""

from typing import Literal

import keras
from keras import ops

from jvpreg import probes as probes_module
from jvpreg.common import checks
from jvpreg.common.typing import Config, Seed, Structure, Tensor
from jvpreg.estimators.norms import squared_norm
from jvpreg.regularizers.base import JacobianRegularizer, Seen


@keras.saving.register_keras_serializable(package="jvpreg")
class JacobianNorm(JacobianRegularizer):
    """Penalizes `‖J‖_F²`, the squared Frobenius norm of each example's Jacobian, estimated without bias by probes.

    Args:
        strength: the loss gains `strength × mean ‖J‖_F²`; Hoffman, Roberts & Yaida's λ is `2 × strength`.
        num_probes: P, the number of probes for each example in each step.
        probes: `"gaussian"`, `"rademacher"`, `"sphere"` or `"orthogonal"`: see `jvpreg.probes.draw`.
        side: `"input"` pushes directions of the input forward; `"output"` pulls cotangents of the output back.
        name: of its metric; it logs `frobenius_norm_squared`, the mean over the examples of `‖J‖_F²`.
        at: the path of a layer, such as an embedding: the Jacobian is then by what this layer returned, at the data.

    The variance of one gaussian probe is `2‖JᵀJ‖_F²`, on the sphere of radius √D it is
    `2D/(D+2)·(‖JᵀJ‖_F² − ‖J‖_F⁴/D)`; on the output side the same with K for D, so for few outputs
    `side="output", probes="sphere"` varies least, and `"orthogonal"` with K probes is exact. On the input side a
    weight gradient is one backpropagation through a forward computation; on the output side it is one through a
    transposed pass.

    Raises:
        ValueError: an argument is out of its range.

    Reference: Hoffman, Roberts & Yaida (2019), "Robust Learning with Jacobian Regularization"; Balestriero &
    Baraniuk (2021), equation 13.

    Example:

    >>> import jvpreg
    >>> jvpreg.regularizers.JacobianNorm(0.01, num_probes=1).get_config()["side"]
    'input'
    """

    default_name = "frobenius_norm_squared"

    def __init__(
        self,
        strength: float,
        num_probes: int = 1,
        probes: str = "gaussian",
        side: Literal["input", "output"] = "input",
        name: str | None = None,
        at: str | None = None,
    ):
        super().__init__(strength, name, at)
        self.num_probes = checks.count("num_probes", num_probes)
        self.probes = checks.choice("probes", probes, probes_module.KINDS)
        self.side = checks.choice("side", side, ("input", "output"))

    def directions(self, inputs: Structure, labels: Structure | None, seed: Seed) -> Structure | None:
        """Random directions of the input, `(P, B, …)`, if that is the side."""
        return probes_module.draw(self.probes, inputs, self.num_probes, seed) if self.side == "input" else None

    def cotangents(self, outputs: Structure, labels: Structure | None, seed: Seed) -> Structure | None:
        """Random cotangents of the output, `(P, B, …)`, if that is the side."""
        return probes_module.draw(self.probes, outputs, self.num_probes, seed) if self.side == "output" else None

    def penalty(self, seen: Seen) -> Tensor:
        """The mean of `‖J u‖²`, or of `‖Jᵀ v‖²`, over the probes: `(B,)`."""
        return ops.mean(squared_norm(seen.jvp if self.side == "input" else seen.vjp), axis=0)

    def get_config(self) -> Config:
        """The arguments of `__init__`."""
        return {
            **super().get_config(),
            "num_probes": self.num_probes,
            "probes": self.probes,
            "side": self.side,
        }
