"""The base class of matching losses, and what they see of a network."""

import re
from collections.abc import Sequence
from typing import Any, Literal

import keras
from keras import ops, tree

from jvpreg.common import checks
from jvpreg.common.typing import Config, Seed, Structure, Tensor
from jvpreg.distillation.pairs import LayerPairs, Site
from jvpreg.linearization import Linearization

TARGETS = ("label", "predicted")


class View:
    """What the losses see of one network in a step. One backward pass serves all losses that pull a cotangent back.

    Args:
        linearization: of the network at the batch.
        labels: those of `fit`, or None.
        cotangents: by target, each like the outputs, `(B, K)`.
        nodes: names of the nodes whose bias-Jacobians are seen.
        with_inputs: whether the input-Jacobian is seen.

    Attributes:
        linearization: the argument `linearization`.
        labels: the argument `labels`.
        outputs: the network's outputs, a flat list of `(B, …)`.
    """

    def __init__(
        self,
        linearization: Linearization,
        labels: Structure | None,
        cotangents: dict[str, Tensor],
        nodes: Sequence[str],
        with_inputs: bool,
    ):
        self.linearization = linearization
        self.labels = labels
        self.outputs = tree.flatten(linearization.outputs)
        self._places = {target: i for i, target in enumerate(cotangents)}
        self._at_inputs: Any = None
        self._at_nodes: dict[str, Any] = {}
        if cotangents:
            stacked = ops.stack([ops.cast(v, self.outputs[0].dtype) for v in cotangents.values()])
            self._at_inputs, self._at_nodes = linearization.bias_jacobians(stacked, nodes, with_inputs)

    def input_jacobian(self, target: str) -> list:
        """`Jᵀ v` for a target's cotangent v: a flat list like the inputs, `(B, …)`."""
        pulled = self.linearization.flatten_inputs(self._at_inputs)
        return [gradient[self._places[target]] for gradient in pulled]

    def bias_jacobian(self, target: str, node: str) -> Tensor:
        """`∂(vᵀ f)/∂y ⊙ c` at a node with output y and intercept c: `(B, …)`, shaped like y, the examples first."""
        return self._at_nodes[node][self._places[target]]

    def node_output(self, node: str) -> Tensor:
        """A node's output, `(B, …)`."""
        return self.linearization.node_outputs([node])[node]


class MatchingLoss(keras.distillation.DistillationLoss):
    """Base class: what it sees of the teacher and of the student, and how far apart the two are.

    A subclass overrides `see` and `distance`, and `get_config` if `__init__` takes more arguments. It runs no network.

    Args:
        weight: of the loss, not negative: the distiller's loss gains `weight × mean(distance)`. If it is 0, the
            distance is reported but not trained on.
        name: of its metric; by default the class's name in snake case.

    Attributes:
        target: whose cotangent is pulled back: `"label"`, `"predicted"` (the teacher's largest output), or None.
        sees_inputs: whether the input-Jacobian of the target is seen.
        pairs: the layers whose maps are seen, or None.
        draws: whether it sees random directions, which `draw` then draws anew in every step.
        measures: names of what `measure` returns.

    Raises:
        ValueError: `weight` is negative or not finite.

    Example:

    >>> import keras, jvpreg
    >>> @keras.saving.register_keras_serializable(package="examples")
    ... class MarginMatching(jvpreg.distillation.MatchingLoss):
    ...     def see(self, view, sites, directions):
    ...         top = keras.ops.top_k(view.outputs[0], 2)[0]
    ...         return [top[:, 0] - top[:, 1]]
    ...     def distance(self, teacher, student):
    ...         return (teacher[0] - student[0]) ** 2
    >>> MarginMatching(0.1).name
    'margin_matching'
    """

    target: Literal["label", "predicted"] | None = None
    sees_inputs = False
    pairs: LayerPairs | None = None
    draws = False
    measures: tuple[str, ...] = ()

    def __init__(self, weight: float, name: str | None = None):
        self.weight = checks.number("weight", weight, least=0, owner=type(self).__name__)
        self.name = checks.text("name", name, optional=True) or snake_case(type(self).__name__)

    def draw(self, inputs: Structure, seed: Seed) -> Structure:
        """Random directions `(P, B, …)` like the inputs, the same for teacher and student."""
        raise NotImplementedError(
            f"{type(self).__name__} draws directions and must override `draw(self, inputs, seed)`."
        )

    def see(self, view: View, sites: Sequence[Site], directions: Structure | None) -> list:
        """The tensors to compare of one network, each `(B, …)`.

        Args:
            view: the network.
            sites: its layers, one for each of `pairs`.
            directions: what `draw` returned.
        """
        raise NotImplementedError(f"{type(self).__name__} must override `see(self, view, sites, directions)`.")

    def distance(self, teacher: list, student: list) -> Tensor:
        """The distance between what was seen of teacher and student, `(B,)`."""
        raise NotImplementedError(f"{type(self).__name__} must override `distance(self, teacher, student)`.")

    def measure(self, teacher: list, student: list) -> dict[str, Tensor]:
        """What is reported beside the distance, each `(B,)`, by the names in `measures`. It is not trained on."""
        return {}

    def validate_model_compatibility(self, teacher: keras.Model, student: keras.Model) -> None:
        """Tells Keras' own `Distiller` that it cannot compute this loss.

        Raises:
            ValueError: always, except for losses that need only outputs.
        """
        raise ValueError(
            f"{type(self).__name__} needs more of a network than a layer's output, which is all that "
            "`keras.distillation.Distiller` gives. Use `jvpreg.JacobianDistiller`."
        )

    def get_config(self) -> Config:
        """The arguments of `__init__`, as Keras serializes them."""
        return {"weight": self.weight, "name": self.name}

    @classmethod
    def from_config(cls, config: Config) -> "MatchingLoss":
        """The loss that `get_config` described."""
        return cls(**config)


class KerasLoss(MatchingLoss):
    """One of Keras' own distillation losses, of outputs or of one layer of each network; its weight is 1.

    It is computed for each example by itself, so that sample weights apply to it.

    Args:
        loss: the loss.
        name: of its metric, the mean over the examples of the loss; by default the name of its class in snake case.
    """

    def __init__(self, loss: keras.distillation.DistillationLoss, name: str | None = None):
        super().__init__(1.0, name or snake_case(type(loss).__name__))
        self.loss = loss
        layers: Any = getattr(loss, "teacher_layer_name", None), getattr(loss, "student_layer_name", None)
        if layers != (None, None):
            self.pairs = LayerPairs([layers], "outputs", type(loss).__name__)

    def see(self, view: View, sites: Sequence[Site], directions: Structure | None) -> list:
        """The outputs, or the layer's output."""
        return [view.node_output(sites[0].nodes[-1])] if sites else view.outputs

    def distance(self, teacher: list, student: list) -> Tensor:
        """The loss of each example, as a batch of one."""

        def of_one(pair: tuple) -> Tensor:
            one_each = tree.map_structure(lambda tensor: ops.expand_dims(tensor, 0), pair)
            return self.loss.compute_loss(*[side[0] if len(side) == 1 else side for side in one_each])

        return ops.vectorized_map(of_one, (teacher, student))


def snake_case(name: str) -> str:
    """The name of a class as a metric's name."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def squared_distance(teacher: Sequence, student: Sequence) -> Tensor:
    """`Σ ‖a − b‖²` over pairs of tensors `(B, …)`, of each example: `(B,)`, in float32 at least."""
    parts = []
    for a, b in zip(teacher, student, strict=True):
        dtype = keras.backend.result_type(a.dtype, b.dtype, "float32")
        difference = ops.cast(b, dtype) - ops.cast(a, dtype)
        parts.append(ops.sum(ops.square(ops.reshape(difference, (ops.shape(difference)[0], -1))), axis=-1))
    return sum(parts)
