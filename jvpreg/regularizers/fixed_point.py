"""A penalty that stabilizes fixed-point layers."""

from typing import Any

import keras
from keras import ops, tree

from jvpreg import probes
from jvpreg.common import checks
from jvpreg.common.typing import Config, Seed, Structure, Tensor
from jvpreg.estimators.fixed_point import frozen_fixed_point
from jvpreg.estimators.norms import squared_norm
from jvpreg.linearization import Linearization
from jvpreg.regularizers.base import JacobianRegularizer, Seen
from jvpreg.regularizers.capabilities import Looks


@keras.saving.register_keras_serializable(package="jvpreg")
class FixedPointJacobianNorm(Looks, JacobianRegularizer):
    """Penalizes `‖∂_z f‖_F²` of a `FixedPoint` layer's cell at its fixed point: the smaller, the fewer iterations.

    Estimated without bias by random directions of z. It costs one product with the frozen cell, and no solve, except
    that its gradient solves for how the fixed point moves with the weights.

    Args:
        strength: the loss gains `strength × mean ‖∂_z f‖_F²`.
        layer: the path of the layer, as a linearization's nodes have it; by default the only one of the model.
        num_probes: the number of random directions for each example.
        name: of its metric; it logs `fixed_point_frobenius_norm_squared`, the mean over the examples of `‖∂_z f‖_F²`.

    Raises:
        ValueError: an argument is out of its range; in `fit`, there is no such layer.

    Reference: Bai, Koltun & Kolter (2021), "Stabilizing Equilibrium Models by Jacobian Regularization", section 4.

    Example:

    >>> import jvpreg
    >>> jvpreg.regularizers.FixedPointJacobianNorm(0.1).name
    'fixed_point_frobenius_norm_squared'
    """

    default_name = "fixed_point_frobenius_norm_squared"

    def __init__(self, strength: float, layer: str | None = None, num_probes: int = 1, name: str | None = None):
        super().__init__(strength, name)
        self.layer = checks.text("layer", layer, optional=True)
        self.num_probes = checks.count("num_probes", num_probes)

    def draw(self, linearization: Linearization, inputs: Structure, seed: Seed) -> Structure:
        """Standard normal directions of z, `(P, B, …)`."""
        z = frozen_fixed_point(linearization, self.layer).residuals[0]
        batch = ops.shape(tree.flatten(inputs)[0])[0]
        return probes.draw("gaussian", ops.zeros((batch, *z.shape[1:]), z.dtype), self.num_probes, seed)

    def look(self, linearization: Linearization, drawn: Any, labels: Structure | None) -> Any:
        """`∂_z f ε`: `(P, B, …)`."""
        pushforward = frozen_fixed_point(linearization, self.layer)
        product = pushforward.state_product(ops.cast(drawn, pushforward.residuals[0].dtype))
        return ops.cast(product, drawn.dtype)

    def penalty(self, seen: Seen) -> Tensor:
        """The mean of `‖∂_z f ε‖²` over the directions: `(B,)`."""
        return ops.mean(squared_norm(seen.found), axis=0)

    def get_config(self) -> Config:
        """The arguments of `__init__`."""
        return {**super().get_config(), "layer": self.layer, "num_probes": self.num_probes}
