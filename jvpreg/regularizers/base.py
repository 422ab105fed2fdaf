"""What a Jacobian regularizer is: where it looks, and what it charges for what it sees."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jvpreg.common import checks
from jvpreg.common.typing import Config, Seed, Structure, Tensor


@dataclass(frozen=True)
class Seen:
    """What a regularizer sees when it is asked for its penalty.

    Attributes:
        jvp: `J u` for its own directions, `(P, B, …)` like the outputs; None if it gave none.
        vjp: `Jᵀ v` for its own cotangents, `(Q, B, …)` like the inputs; None if it gave none.
        directions: the directions u, `(P, B, …)`, or None.
        cotangents: the cotangents v, `(Q, B, …)`, or None.
        inputs: the model's inputs, `(B, …)`, a list if there are several; or what the layer `at` returned, `(B, …)`.
        outputs: the model's outputs, `(B, …)`.
        labels: the labels given to `fit`, or None. A regularizer with labels of its own gets the dict as it was given;
            the others get the labels of the loss.
        found: what `look` returned.
        carried: what the regularizer carries from step to step, or None.
        weights: the weight of each example in the loss, `(B,)`, or None: all are 1.
        finite: whether the inputs and outputs of each example are finite, `(B,)`, or None: all are. The Jacobian of
            other examples means nothing, even if it is finite: the slope of ReLU at NaN is 0.
        computed: a place in which its methods keep results for each other.
    """

    jvp: Structure
    vjp: Structure
    directions: Structure
    cotangents: Structure
    inputs: Structure
    outputs: Structure
    labels: Structure
    found: Any = None
    carried: Tensor = None
    weights: Tensor | None = None
    finite: Tensor | None = None
    computed: dict = field(default_factory=dict, repr=False, compare=False)


class JacobianRegularizer:
    """Base class: a subclass says where it looks, and what it charges for what it sees. It never runs the model.

    Override `directions` (for products `J u`), `cotangents` (for `Jᵀ v`), or both, and `penalty`; and `get_config`
    if `__init__` takes more arguments. The directions of all regularizers of a model go through one tangent pass.
    A regularizer that needs more lists one of these as a base class, before this one: `Looks` (at nodes, by products
    of its own), `Carries` (a variable from step to step), `Searches` (for directions, from what it carries),
    `Scheduled` (another strength in each step), `Constrains` (something that holds or does not).

    Args:
        strength: the penalty's weight in the loss, not negative: the loss gains `strength × mean(penalty)`. If it is 0,
            the penalty is reported but not trained on, unless it is `Scheduled`.
        name: of its metric; by default the class's name in snake case.
        at: `"data"`, or the path of a layer, as `jvpreg.layer_paths` has it; None: what the class says.

    Attributes:
        at: where it looks. `"data"`: at the Jacobian by the inputs. The path of a layer, as `jvpreg.linearize` takes
            it: at the Jacobian by what this layer returned, which then is the `inputs` of its methods, at the data too.
            A function `(inputs, seed) -> points (N, …)`: at the Jacobian by the inputs, at points. Regularizers with
            equal functions share the points and the one run of the model at them. The function gets the inputs as
            layers take them: integers (codes of categories) as integers, bytes as floats. If it has an attribute
            `by_labels` that is true, it gets the labels too: `(inputs, seed, labels)`.
        default_name: the name of its metric, which is the mean of its penalty over the examples, without its strength;
            if it is empty, the class's name in snake case.
        label_keys: keys of a dict of labels that are its own: neither the loss nor a metric gets these labels.
        measures: what it reports beside its penalty: see `Constrains`.

    Raises:
        ValueError: `strength` is negative or not finite; in `compile`, there is no layer `at`, or its output is none
            by which there is one Jacobian of each example.

    Example:

    >>> import keras, jvpreg
    >>> @keras.saving.register_keras_serializable(package="examples")
    ... class BrightnessInvariance(jvpreg.regularizers.JacobianRegularizer):
    ...     def directions(self, inputs, labels, seed):
    ...         return keras.ops.expand_dims(keras.ops.ones_like(inputs), 0)
    ...     def penalty(self, seen):
    ...         return keras.ops.sum(seen.jvp[0] ** 2, axis=-1)
    >>> BrightnessInvariance(0.1).name
    'brightness_invariance'
    """

    default_name = ""
    at: str | Callable = "data"
    label_keys: tuple[str, ...] = ()
    measures: Mapping[str, str] = {}

    def __init__(self, strength: float, name: str | None = None, at: str | None = None):
        self.strength = checks.number("strength", strength, least=0, owner=type(self).__name__)
        snake_case = re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()
        self.name = checks.text("name", name, optional=True) or self.default_name or snake_case
        if at is not None:
            self.at = checks.text("at", at, owner=type(self).__name__)

    def check(self, inputs: Structure, outputs: Structure) -> None:
        """Raises a ValueError, at `compile`, if it does not fit a model with such inputs and outputs, `(B, …)`."""
        return

    def directions(self, inputs: Structure, labels: Structure | None, seed: Seed) -> Structure | None:
        """Directions `(P, B, …)` like `inputs`, to be pushed forward; or None.

        Draw random ones by `jvpreg.probes.draw`: then each replica of `tf.distribute` draws for its examples what one
        device would draw for them. `keras.random` draws the same on every replica.
        """
        return None

    def cotangents(self, outputs: Structure, labels: Structure | None, seed: Seed) -> Structure | None:
        """Cotangents `(Q, B, …)` like `outputs`, to be pulled back; or None."""
        return None

    def penalty(self, seen: Seen) -> Tensor:
        """The penalty of each example, `(B,)`, from what was seen."""
        raise NotImplementedError(f"{type(self).__name__} must override `penalty(self, seen)`.")

    def get_config(self) -> Config:
        """The arguments of `__init__`, as Keras serializes them."""
        # A class whose `__init__` takes no `at` has none of its own.
        moved = isinstance(self.at, str) and self.at != type(self).at
        return {"strength": self.strength, "name": self.name, **({"at": self.at} if moved else {})}

    @classmethod
    def from_config(cls, config: Config) -> "JacobianRegularizer":
        """The regularizer that `get_config` described."""
        return cls(**config)
