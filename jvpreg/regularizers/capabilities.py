"""What a regularizer can do beside looking along directions. Each ability is a base class to add."""

from collections.abc import Mapping
from typing import Any

import keras

from jvpreg.common.typing import Seed, Structure, Tensor
from jvpreg.linearization import Linearization
from jvpreg.regularizers.base import JacobianRegularizer, Seen


class Looks:
    """A regularizer that looks at more than products along directions or cotangents: at nodes, by products of its own.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> class HiddenNorm(jvpreg.regularizers.Looks, jvpreg.regularizers.JacobianRegularizer):
    ...     def draw(self, linearization, inputs, seed):
    ...         return jvpreg.probes.draw("gaussian", inputs, 1, seed)
    ...     def look(self, linearization, drawn, labels):
    ...         return linearization.block("hidden").jvp(drawn)
    ...     def penalty(self, seen):
    ...         return keras.ops.sum(seen.found[0] ** 2, axis=-1)
    >>> base = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="hidden"), keras.layers.Dense(1)])
    >>> model = jvpreg.JacobianModel(base)
    >>> model.compile(loss="mse", jacobian_regularizers=[HiddenNorm(0.1)])
    >>> sorted(model.evaluate(np.ones((4, 3)), np.ones((4, 1)), verbose=0, return_dict=True))
    ['hidden_norm', 'loss']
    """

    def draw(self, linearization: Linearization, inputs: Structure, seed: Seed) -> Any:
        """The random numbers that `look` needs, for the examples of `inputs`, which may be a part of the batch."""
        return

    def look(self, linearization: Linearization, drawn: Any, labels: Structure | None) -> Any:
        """What the regularizer sees by products of its own; it becomes `seen.found`. `drawn` comes from `draw`."""
        raise NotImplementedError(f"{type(self).__name__} must override `look(self, linearization, drawn, labels)`.")


class Carries:
    """A regularizer that carries a variable from step to step. It is not trained, and is saved with the model.

    Attributes:
        carried_start: how the variable starts: `"normal"` or `"zeros"`.
    """

    carried_start = "normal"

    def carried_shape(self, outputs: Structure) -> tuple[int, ...] | None:
        """The shape of the variable, for outputs `(B, …)`; None if there is none."""
        raise NotImplementedError(f"{type(self).__name__} must override `carried_shape(self, outputs)`.")

    def sums_shape(self, carried_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what `sums` returns; by default the shape of the variable."""
        return carried_shape

    def sums(self, seen: Seen, carried: Tensor) -> Tensor:
        """What `carry` needs of the examples: a tensor of sums over them, computed after the products.

        Under `tf.distribute` each replica sees some of the examples, and `carry` gets the sums over all.
        """
        raise NotImplementedError(f"{type(self).__name__} must override `sums(self, seen, carried)`.")

    def carry(self, carried: Tensor, sums: Tensor) -> Tensor:
        """The variable's value for the next step. If it is not finite, the variable keeps its value."""
        raise NotImplementedError(f"{type(self).__name__} must override `carry(self, carried, sums)`.")


class Searches(Carries):
    """A regularizer that finds its directions from what it carries, in place of `directions` and `cotangents`."""

    def search(self, linearization: Linearization, carried: Tensor) -> Tensor:
        """Directions `(P, B, …)` like the inputs. It may compute products with the Jacobian, at their own cost."""
        raise NotImplementedError(f"{type(self).__name__} must override `search(self, linearization, carried)`.")


class Scheduled:
    """A regularizer whose strength depends on the training step.

    Attributes:
        scheduled: whether this one's strength does.
    """

    scheduled = True

    def strength_at(self, step: Tensor) -> Tensor:
        """The weight in the loss at a training step, counted from 1. It takes the place of `strength`."""
        raise NotImplementedError(f"{type(self).__name__} must override `strength_at(self, step)`.")


class Constrains:
    """A regularizer of something that holds or does not; it may not fit a model, or contradict another regularizer.

    Attributes:
        measures: names of what it reports beside its penalty, and how the numbers of several steps are combined:
            `"mean"`, `"max"` or `"last"`.
    """

    measures: Mapping[str, str] = {}

    def contradicts(self, other: JacobianRegularizer) -> str | None:
        """Why the two cannot both hold, in words; None if they can, as far as this is known beforehand."""
        return None

    def measure(self, seen: Seen) -> dict[str, Tensor]:
        """A scalar for each name in `measures`."""
        raise NotImplementedError(f"{type(self).__name__} must override `measure(self, seen)`, or have no `measures`.")


def is_scheduled(regularizer: JacobianRegularizer) -> bool:
    """Whether a regularizer's strength depends on the training step."""
    return isinstance(regularizer, Scheduled) and regularizer.scheduled


def carried_name(name: str) -> str:
    """The name of the variable that a regularizer carries. It has no slash, which would make a folder in a file."""
    return f"carried_{name.replace('/', '>')}"


def carried_variable(regularizer: JacobianRegularizer, outputs: Structure, seed: int) -> dict[str, Any] | None:
    """The arguments of the `keras.Variable` that a regularizer carries, for outputs `(B, …)`; None if it carries none.

    All replicas of `tf.distribute` assign the same value to it.
    """
    if not isinstance(regularizer, Carries):
        return None
    shape = regularizer.carried_shape(outputs)
    if shape is None:
        return None
    zeros = regularizer.carried_start == "zeros"
    start = keras.initializers.Zeros() if zeros else keras.initializers.RandomNormal(stddev=1.0, seed=seed)
    options = {"trainable": False, "autocast": False, "aggregation": "only_first_replica"}
    return {"initializer": start, "shape": shape, "name": carried_name(regularizer.name), **options}
