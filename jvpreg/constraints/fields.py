"""Constraints on vector fields: conservative, or free of divergence."""

import itertools
from typing import Any

import keras
from keras import ops

from jvpreg import probes
from jvpreg.common import checks
from jvpreg.common.typing import Config, Seed, Structure, Tensor
from jvpreg.constraints.base import Constraint
from jvpreg.estimators.operator import flatten
from jvpreg.regularizers.base import Seen


class _Field(Constraint):
    """A constraint on a model with as many outputs as inputs."""

    def check(self, inputs: Structure, outputs: Structure) -> None:
        """Raises a ValueError if there are not as many outputs as inputs, at least two."""
        super().check(inputs, outputs)
        sizes = probes.dimension(inputs), probes.dimension(outputs)
        if sizes[0] != sizes[1] or sizes[0] < 2:
            raise ValueError(
                f"`{self.name}` ({type(self).__name__}) is a constraint on a field. Expected as many outputs as "
                f"inputs, 2 or more. Received: {sizes[0]} inputs and {sizes[1]} outputs."
            )

    @property
    def is_constant_in_regions(self) -> bool:
        """True: the violation is a function of `J` alone."""
        return True


@keras.saving.register_keras_serializable(package="jvpreg")
class Symmetric(_Field):
    """`J = Jᵀ`: a conservative field, the gradient of a potential.

    Args:
        num_pairs: None looks at all pairs of coordinates, by as many directions as there are inputs. A number looks at
            the asymmetry `wᵀ J u − uᵀ J w` of this many pairs of random directions, by two directions each; on average
            its square is `‖J − Jᵀ‖_F²`.
        **arguments: of every `Constraint`: `enforcement`, `at`, `tolerance`, `name`.

    The violations are the absolute asymmetries; all share one multiplier.

    Raises:
        ValueError: an argument is out of its range; in `compile`, the model is no field.

    Reference: Balestriero & Baraniuk (2021), section 1.

    Example:

    >>> import jvpreg
    >>> jvpreg.constraints.Symmetric(num_pairs=1).get_config()["num_pairs"]
    1
    """

    def __init__(self, num_pairs: int | None = None, **arguments: Any):
        super().__init__(**arguments)
        self.num_pairs = checks.count("num_pairs", num_pairs, optional=True)

    def directions(self, inputs: Structure, labels: Structure | None, seed: Seed) -> Structure:
        """The basis of the inputs, or pairs of random directions."""
        if self.num_pairs is None:
            return probes.basis(inputs)
        return probes.draw("gaussian", inputs, 2 * self.num_pairs, seed)

    def violation(self, seen: Seen) -> Tensor:
        """`abs(J_kp − J_pk)`, or the asymmetry of the random pairs."""
        products, directions = flatten(seen.jvp), flatten(seen.directions)
        if self.num_pairs is None:
            pairs = list(itertools.combinations(range(products.shape[0]), 2))
            parts = [products[p, :, k] - products[k, :, p] for p, k in pairs]
        else:
            parts = [
                ops.sum(directions[p + 1] * products[p] - directions[p] * products[p + 1], axis=-1)
                for p in range(0, 2 * self.num_pairs, 2)
            ]
        return ops.abs(ops.stack(parts, axis=-1))

    def get_config(self) -> Config:
        """The arguments of `__init__`."""
        return {**super().get_config(), "num_pairs": self.num_pairs}


@keras.saving.register_keras_serializable(package="jvpreg")
class DivergenceFree(_Field):
    """`tr J = 0`: an incompressible field.

    Args:
        **arguments: of every `Constraint`: `enforcement`, `at`, `tolerance`, `name`.

    The violation is `abs(tr J)`, computed exactly, by as many directions as there are inputs: an estimate of the trace
    from fewer directions would not be zero even if the trace is.

    Raises:
        ValueError: an argument is out of its range; in `compile`, the model is no field.

    Reference: Balestriero & Baraniuk (2021), section 1.

    Example:

    >>> import jvpreg
    >>> from jvpreg.constraints import AugmentedLagrangian, Box, DivergenceFree
    >>> DivergenceFree(enforcement=AugmentedLagrangian(10.0), at=Box(-1.0, 1.0, num_points=256)).name
    'divergence_free'
    """

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)

    def directions(self, inputs: Structure, labels: Structure | None, seed: Seed) -> Structure:
        """The basis of the inputs."""
        return probes.basis(inputs)

    def violation(self, seen: Seen) -> Tensor:
        """`abs(tr J)`."""
        products = flatten(seen.jvp)
        trace = sum(products[i, :, i] for i in range(products.shape[0]))
        return ops.expand_dims(ops.abs(trace), -1)
