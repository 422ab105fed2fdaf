"""The base class of constraints: regularizers whose penalty is the price of a violation."""

import math
from collections.abc import Callable, Mapping

import keras
from keras import ops

from jvpreg.common import checks
from jvpreg.common.configs import revive
from jvpreg.common.typing import Config, Structure, Tensor
from jvpreg.constraints.enforcement import AugmentedLagrangian, Penalty, as_enforcement
from jvpreg.constraints.points import Box, as_points, between
from jvpreg.engine.finite import nan_unless
from jvpreg.estimators.operator import flatten
from jvpreg.regularizers.base import JacobianRegularizer, Seen
from jvpreg.regularizers.capabilities import Carries, Constrains, Scheduled

MEASURES = {"violation_mean": "mean", "violation_max": "max", "violated": "mean"}
MULTIPLIER = "multiplier_max"


class Constraint(Constrains, Carries, Scheduled, JacobianRegularizer):
    """Base class: a subclass says where it looks (`directions`, `cotangents`) and how far it is violated.

    Its metrics, in training and validation, for a constraint named `monotone`: `monotone`, the penalty;
    `monotone/violation_mean` and `monotone/violation_max`, over the points of an epoch, where each point counts with
    its largest component; `monotone/violated`, the fraction of points where this exceeds the tolerance; and with an
    `AugmentedLagrangian` `monotone/multiplier_max`, the largest multiplier.

    Args:
        enforcement: a `Penalty`, an `AugmentedLagrangian`, or a number, the strength of a penalty.
        at: where it must hold: `"data"`, `"between"` (points between examples of the batch, each with the integers of
            one of them), or a sampler `(inputs, seed) -> points (N, …)` such as `Box`. Away from the data the model is
            run once more, in inference mode, for all constraints with the same `at`; points have no labels and no
            sample weights. Or the path of a layer: it must hold at the data, of the Jacobian by what this layer
            returned, which takes the place of the inputs everywhere: features, directions and functions are of that.
            Points are points of the inputs only.
        tolerance: the violation above which a point counts as violated.
        name: of its metrics.

    Raises:
        ValueError: an argument is out of its range.
    """

    carried_start = "zeros"

    def __init__(
        self,
        enforcement: Penalty | AugmentedLagrangian | float = 1.0,
        at: str | Callable = "data",
        tolerance: float = 1e-3,
        name: str | None = None,
    ):
        self.enforcement = as_enforcement(enforcement)
        super().__init__(self.enforcement.strength, name)
        self.at = as_points(at)
        self.tolerance = checks.number("tolerance", tolerance, least=0)
        self.scheduled = self.enforcement.schedule is not None
        self.measures = {**MEASURES, MULTIPLIER: "last"} if self._has_multipliers else MEASURES

    @property
    def _place(self) -> str | Callable:
        """Where it must hold. `"between"` includes the data, its end points."""
        return "data" if self.at is between else self.at

    @property
    def _has_multipliers(self) -> bool:
        return isinstance(self.enforcement, AugmentedLagrangian)

    def check(self, inputs: Structure, outputs: Structure) -> None:
        """Raises a ValueError if a box of points does not fit the inputs."""
        if isinstance(self.at, Box):
            self.at.check(inputs)

    def violation(self, seen: Seen) -> Tensor:
        """How far each component is violated, `(B, C)`: zero if it holds, otherwise positive."""
        raise NotImplementedError(f"{type(self).__name__} must override `violation(self, seen)`.")

    def components(self, outputs: Structure) -> int:
        """How many components have a multiplier of their own: C, or 1 if all share one."""
        return 1

    def intervals(self) -> Mapping[int, tuple[float, float]]:
        """The interval in which the slope by a feature must lie, for each feature that the constraint limits."""
        return {}

    @property
    def is_constant_in_regions(self) -> bool:
        """Whether the violation of a piecewise affine model is constant in each of its regions."""
        return False

    def contradicts(self, other: JacobianRegularizer) -> str | None:
        """The feature for which the two allow no common slope at one place, or only a single number."""
        if not isinstance(other, Constraint) or self._place != other._place:
            return None
        mine, theirs = self.intervals(), other.intervals()
        for feature in sorted(set(mine) & set(theirs)):
            (low, high), (other_low, other_high) = mine[feature], theirs[feature]
            least, most = max(low, other_low), min(high, other_high)
            if least > most:
                return f"which leave no slope by feature {feature}: {mine[feature]} and {theirs[feature]}."
            if least == most and low < high and other_low < other_high:
                return (
                    f"which leave the slope by feature {feature} nothing but {least:g}: {mine[feature]} and "
                    f"{theirs[feature]}. If this is intended, say `Bounded({least:g}, {least:g}, [{feature}])`."
                )
        return None

    def strength_at(self, step: Tensor) -> Tensor:
        """The strength of the penalty at a training step; 1 if there are multipliers."""
        return self.enforcement.strength_at(step)

    def carried_shape(self, outputs: Structure) -> tuple[int, ...] | None:
        """The shape of the multipliers and of the sums by which they will grow."""
        return self.enforcement.state_shape(self.components(outputs))

    def penalty(self, seen: Seen) -> Tensor:
        """What the enforcement charges: `(B,)`."""
        return self.enforcement.price(self._components_of(seen), seen.carried)

    def sums_shape(self, carried_shape: tuple[int, ...]) -> tuple[int, ...]:
        """One number more than there are multipliers."""
        return (carried_shape[1] + 1,)

    def sums(self, seen: Seen, carried: Tensor) -> Tensor:
        """The sums of the violations over the examples, by multiplier, and the number of examples."""
        violation = ops.cast(ops.stop_gradient(self._components_of(seen)), carried.dtype)
        if seen.weights is not None:
            # As in the loss: an example of weight 0 must not make multipliers grow.
            violation = violation * ops.expand_dims(ops.cast(seen.weights, violation.dtype), -1)
        if carried.shape[1] == 1:
            violation = ops.mean(violation, axis=1, keepdims=True)
        return ops.sum(ops.pad(violation, ((0, 0), (0, 1)), constant_values=1.0), axis=0)

    def carry(self, carried: Tensor, sums: Tensor) -> Tensor:
        """The multipliers after this step."""
        assert isinstance(self.enforcement, AugmentedLagrangian)
        return self.enforcement.advance(sums[:-1] / ops.maximum(sums[-1], 1.0), carried)

    def measure(self, seen: Seen) -> dict[str, Tensor]:
        """The violation's mean, its maximum, the fraction of points, and the largest multiplier."""
        worst = ops.stop_gradient(ops.max(self._components_of(seen), axis=-1))
        worst = worst if seen.finite is None else nan_unless(seen.finite, worst)
        unknown = ops.any(ops.isnan(worst))  # False for no examples, which a replica may have
        measured = {
            "violation_mean": ops.mean(worst),
            # Not every backend's maximum of a number and NaN is NaN.
            "violation_max": ops.where(unknown, math.nan, ops.max(worst)),
            # A violation of NaN counts as violated. Not `logical_not`: TensorFlow's graphs would turn it into a `>`,
            # which is false for NaN.
            "violated": ops.mean(ops.where(worst <= self.tolerance, 0.0, ops.ones_like(worst))),
        }
        return {**measured, MULTIPLIER: ops.max(seen.carried[0])} if self._has_multipliers else measured

    def _components_of(self, seen: Seen) -> Tensor:
        # The price, the sums and the measures use the same components, computed once.
        if self not in seen.computed:
            violation = self.violation(seen)
            seen.computed[self] = ops.cast(violation, keras.backend.result_type(violation.dtype, "float32"))
        return seen.computed[self]

    def get_config(self) -> Config:
        """The arguments of `__init__`."""
        at = "between" if self.at is between else self.at
        return {"enforcement": self.enforcement, "at": at, "tolerance": self.tolerance, "name": self.name}

    @classmethod
    def from_config(cls, config: Config) -> "Constraint":
        """The constraint that `get_config` described.

        Raises:
            ValueError: a function of the config is not registered with Keras.
        """
        return cls(**{key: revive(value) for key, value in config.items()})


def by_example(products: Structure) -> Tensor:
    """Products `(P, B, …)`, or a structure of them, as components of each example: `(B, P·K)`."""
    flat = flatten(products)
    count, size = flat.shape[0], flat.shape[2]
    return ops.reshape(ops.transpose(flat, (1, 0, 2)), (ops.shape(flat)[1], count * size))
