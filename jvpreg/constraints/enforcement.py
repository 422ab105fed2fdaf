"""How a constraint is enforced: by a penalty of a given strength, or by multipliers that grow until it holds."""

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from jvpreg.common import checks
from jvpreg.common.configs import revive
from jvpreg.common.typing import Config, Tensor


@keras.saving.register_keras_serializable(package="jvpreg")
class Penalty:
    """The loss gains `strength × mean Σ v²`, v being the violations of an example.

    The slope of a square is zero where the square is. So at a fixed strength a constraint that has a cost stays
    violated, in proportion to `cost / strength`. An `AugmentedLagrangian` leaves no such violation.

    Args:
        strength: not negative.
        schedule: multiplies the strength: a function of the training step, counted from 1, such as a
            `keras.optimizers.schedules.LearningRateSchedule`. None: constant.

    Raises:
        ValueError: an argument is out of its range.

    Example:

    >>> import keras, jvpreg
    >>> rising = keras.optimizers.schedules.PolynomialDecay(0.0, decay_steps=1000, end_learning_rate=1.0)
    >>> jvpreg.constraints.Monotone([0], enforcement=jvpreg.constraints.Penalty(10.0, rising)).scheduled
    True
    """

    def __init__(self, strength: float = 1.0, schedule: Callable | None = None):
        self.strength = checks.number("strength", strength, least=0)
        self.schedule = checks.function("schedule", schedule, "a function of the training step", optional=True)

    def strength_at(self, step: Tensor) -> Tensor:
        """The strength at a training step."""
        return self.strength if self.schedule is None else self.strength * self.schedule(step)

    def state_shape(self, components: int) -> None:
        """None: nothing is carried from step to step."""
        return

    def price(self, violation: Tensor, carried: Tensor) -> Tensor:
        """What violations `(B, C)` cost an example: `(B,)`."""
        return ops.sum(ops.square(violation), axis=-1)

    def get_config(self) -> Config:
        """The arguments of `__init__`."""
        return {"strength": self.strength, "schedule": self.schedule}

    @classmethod
    def from_config(cls, config: Config) -> "Penalty":
        """The enforcement that `get_config` described."""
        return cls(config["strength"], revive(config["schedule"]))


@keras.saving.register_keras_serializable(package="jvpreg")
class AugmentedLagrangian:
    """The loss gains `mean Σ (λ v + rho/2 v²)`; every few steps each multiplier λ grows by `rho × mean v`.

    Each batch has other examples, so an example has no multiplier of its own. There is one for each component of a
    constraint (for example a feature and an output), for the requirement that its mean violation is zero. Since v is
    not negative, this is the constraint itself, at almost every point of the distribution of points. λ v has a slope
    down to zero violation, so a finite λ makes the constraint hold exactly, which a square does not; and λ grows until
    the constraint holds.

    What is guaranteed: if training settles with finite multipliers, the mean violation is zero over the distribution
    of points. Whether it is small at points that were not drawn has to be measured (by the validation metrics or
    `verify`); new points in every step help (`at="between"`, or a sampler of the domain). Let the learning rate fall to
    zero: at a constant one, the kink of v keeps the weights moving around it.

    Args:
        rho: how fast multipliers grow, positive.
        update_every: the number of steps between updates, each by the mean over these steps. Only steps with penalties
            count: with a `jacobian_interval` of 4, `update_every=5` means every 20 training steps.

    Raises:
        ValueError: an argument is out of its range.

    Reference: Márquez-Neila, Salzmann & Fua (2017), "Imposing hard constraints on deep networks", on Lagrangian
    methods in training; Bertsekas (1982), "Constrained optimization and Lagrange multiplier methods", chapters 2 and
    4, on exact penalties.

    Example:

    >>> import jvpreg
    >>> jvpreg.constraints.AugmentedLagrangian(rho=10.0, update_every=20).get_config()
    {'rho': 10.0, 'update_every': 20}
    """

    schedule = None
    strength = 1.0

    def __init__(self, rho: float = 1.0, update_every: int = 10):
        self.rho = checks.number("rho", rho, above=0)
        self.update_every = checks.count("update_every", update_every)

    def strength_at(self, step: Tensor) -> Tensor:
        """1: the multipliers say how strong it is."""
        return self.strength

    def state_shape(self, components: int) -> tuple[int, int]:
        """The shape of what is carried: rows of multipliers, of sums of violations, and of the number of steps."""
        return 3, components

    def price(self, violation: Tensor, carried: Tensor) -> Tensor:
        """The price of violations `(B, C)` for each example: `(B,)`."""
        multipliers = ops.cast(carried[0], violation.dtype)
        return ops.sum(multipliers * violation + self.rho / 2 * ops.square(violation), axis=-1)

    def advance(self, mean: Tensor, carried: Tensor) -> Tensor:
        """What is carried after a step with the mean violations `(C,)`."""
        multipliers, total, steps = ops.unstack(carried)
        total = total + mean
        steps = steps + 1.0
        due = steps >= self.update_every - 0.5
        grown = ops.where(due, multipliers + self.rho * total / steps, multipliers)
        return ops.stack([grown, ops.where(due, 0.0, total), ops.where(due, 0.0, steps)])

    def get_config(self) -> Config:
        """The arguments of `__init__`."""
        return {"rho": self.rho, "update_every": self.update_every}

    @classmethod
    def from_config(cls, config: Config) -> "AugmentedLagrangian":
        """The enforcement that `get_config` described."""
        return cls(**config)


def as_enforcement(given: Any) -> Penalty | AugmentedLagrangian:
    """The enforcement; a number is the strength of a penalty."""
    if isinstance(given, (Penalty, AugmentedLagrangian)):
        return given
    if not checks.is_real(given) or not 0 <= given < math.inf:
        expected = "a `Penalty`, an `AugmentedLagrangian`, or the strength of a penalty, a finite number, 0 or more"
        raise checks.invalid("enforcement", expected, given)
    return Penalty(given)
