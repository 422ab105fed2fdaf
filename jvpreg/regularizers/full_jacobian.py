"""Penalties on what biases contribute to an output."""

from collections.abc import Sequence
from typing import Any, Literal

import keras
from keras import ops, tree

from jvpreg import probes
from jvpreg.attribution.decomposition import as_cotangent, class_cotangent
from jvpreg.common import checks
from jvpreg.common.typing import Config, Seed, Structure, Tensor
from jvpreg.estimators.norms import squared_norm
from jvpreg.linearization import Linearization
from jvpreg.regularizers.base import JacobianRegularizer, Seen
from jvpreg.regularizers.capabilities import Looks


@keras.saving.register_keras_serializable(package="jvpreg")
class BiasJacobianNorm(Looks, JacobianRegularizer):
    """Penalizes `‖f^b‖²`: the squares of what the biases of some layers contribute to an output, entry by entry.

    The bias-Jacobian of a layer is `∂f/∂y ⊙ c`, with y its output and c its intercept: an explicit bias, the implicit
    bias of batch normalization, or what a smooth activation leaves over. For a convolution it is a map.

    Args:
        strength: the loss gains `strength × mean ‖f^b‖²`.
        layers: paths of layers or of blocks of them, as `Linearization.block` takes them; all by default.
        target: which output. `"label"`: the output of the label, exactly, by one backward pass down to the first of the
            layers. Labels are those of `fit`, class indices or one-hot; a single output `(B, 1)` is the target whatever
            the labels are, and needs none. `"predicted"`: the largest output. `"all"`: the sum over all outputs,
            estimated without bias by pushing directions `c ⊙ ξ`, ξ standard normal, through the layers above.
        num_probes: for `"all"`: the number of random directions for each example.
        name: of its metric; it logs `bias_jacobian_norm_squared`, the mean over the examples of `‖f^b‖²`.
        at: the path of a layer, such as an embedding: the Jacobian is then by what this layer returned, at the data.

    Raises:
        ValueError: an argument is out of its range; in `fit`, a layer is not found or there are no labels.

    Reference: Srinivas & Fleuret (2018), "Full-Jacobian Representation of Neural Networks", section 5.

    Example:

    >>> import jvpreg
    >>> jvpreg.regularizers.BiasJacobianNorm(100.0, layers=["conv9"]).target
    'label'
    """

    default_name = "bias_jacobian_norm_squared"

    def __init__(
        self,
        strength: float,
        layers: Sequence[str] | None = None,
        target: Literal["label", "predicted", "all"] = "label",
        num_probes: int = 1,
        name: str | None = None,
        at: str | None = None,
    ):
        super().__init__(strength, name, at)
        self.layers = _paths(layers)
        self.target = checks.choice("target", target, ("label", "predicted", "all"))
        self.num_probes = checks.count("num_probes", num_probes)

    def draw(self, linearization: Linearization, inputs: Structure, seed: Seed) -> Structure:
        """Standard normal ξ like the output of each node, `(P, B, …)`, if the target is all outputs."""
        if self.target != "all":
            return None
        batch = ops.shape(tree.flatten(inputs)[0])[0]
        outputs = linearization.node_outputs(self.layers)
        drawn = {}
        for name, y in outputs.items():
            # The examples first, as a draw of the whole batch for a replica takes them.
            like = linearization.by_example(name, ops.zeros(linearization.shape_at(name, batch), y.dtype))
            drawn[name] = linearization.from_examples(name, probes.draw("gaussian", like, self.num_probes, seed))
        return drawn

    def look(self, linearization: Linearization, drawn: Any, labels: Structure | None) -> Any:
        """The bias-Jacobian of the target, by node; or the products of the random directions."""
        names = list(linearization.node_outputs(self.layers))
        if drawn is None:
            cotangent = target_cotangent(self, linearization.outputs, labels)
            return linearization.bias_jacobians(cotangent, names, with_inputs=False)[1]
        intercepts = linearization.intercepts_of(names)
        return linearization.jvp(
            taps={name: drawn[name] * ops.cast(intercepts[name], drawn[name].dtype) for name in names}
        )

    def penalty(self, seen: Seen) -> Tensor:
        """`‖f^b‖²`: `(B,)`."""
        if self.target == "all":
            return ops.mean(squared_norm(seen.found), axis=0)
        return _squares(seen.found)

    def get_config(self) -> Config:
        """The arguments of `__init__`."""
        config = {"layers": self.layers, "target": self.target, "num_probes": self.num_probes}
        return {**super().get_config(), **config}


@keras.saving.register_keras_serializable(package="jvpreg")
class FullJacobianNorm(Looks, JacobianRegularizer):
    """Penalizes the norm of the full-Jacobian: `input_weight · ‖∇ₓ f‖² + bias_weight · ‖f^b‖²`, by one backward pass.

    Args:
        strength: the loss gains `strength × mean` of this sum.
        input_weight: of the input-Jacobian's squared norm.
        bias_weight: of the bias-Jacobians'.
        layers: the layers whose bias-Jacobians count: see `BiasJacobianNorm`.
        target: `"label"` or `"predicted"`: see `BiasJacobianNorm`.
        name: of its metric; it logs `full_jacobian_norm_squared`, the mean over the examples of the weighted sum.
        at: the path of a layer, such as an embedding: the Jacobian is then by what this layer returned, at the data.

    Raises:
        ValueError: an argument is out of its range; in `fit`, a layer is not found or there are no labels.

    Reference: Srinivas & Fleuret (2018), "Full-Jacobian Representation of Neural Networks", equation 1.

    Example:

    >>> import jvpreg
    >>> jvpreg.regularizers.FullJacobianNorm(0.1, bias_weight=10.0).input_weight
    1.0
    """

    default_name = "full_jacobian_norm_squared"

    def __init__(
        self,
        strength: float,
        input_weight: float = 1.0,
        bias_weight: float = 1.0,
        layers: Sequence[str] | None = None,
        target: Literal["label", "predicted"] = "label",
        name: str | None = None,
        at: str | None = None,
    ):
        super().__init__(strength, name, at)
        self.input_weight = checks.number("input_weight", input_weight, least=0)
        self.bias_weight = checks.number("bias_weight", bias_weight, least=0)
        self.layers = _paths(layers)
        self.target = checks.choice("target", target, ("label", "predicted"))

    def look(self, linearization: Linearization, drawn: Any, labels: Structure | None) -> Any:
        """The input-Jacobian of each input, and the bias-Jacobians by node, `(B, …)`."""
        cotangent = target_cotangent(self, linearization.outputs, labels)
        return linearization.bias_jacobians(cotangent, list(linearization.node_outputs(self.layers)))

    def penalty(self, seen: Seen) -> Tensor:
        """The weighted sum of squares: `(B,)`."""
        at_inputs, at_nodes = seen.found
        return self.input_weight * _squares(at_inputs) + self.bias_weight * _squares(at_nodes)

    def get_config(self) -> Config:
        """The arguments of `__init__`."""
        config = {"input_weight": self.input_weight, "bias_weight": self.bias_weight}
        return {**super().get_config(), **config, "layers": self.layers, "target": self.target}


def _squares(tensors: Structure) -> Tensor:
    """The sum of all squares of each example, over a structure of `(B, …)`: `(B,)`."""
    flat = [ops.reshape(tensor, (ops.shape(tensor)[0], -1)) for tensor in tree.flatten(tensors)]
    return sum(ops.sum(ops.square(rows), axis=-1) for rows in flat)


def target_cotangent(regularizer: Any, outputs: Structure, labels: Structure | None) -> Structure:
    """The cotangent of a regularizer's target. For outputs `(B, 1)` it selects the one output, whatever the label is.

    Raises:
        ValueError: the target is the label's output, and there are no labels, or they do not fit.
    """
    if regularizer.target == "predicted":
        return as_cotangent(outputs, None)
    leaves = tree.flatten(outputs)
    if len(leaves) == 1 and tuple(leaves[0].shape[1:]) == (1,):
        # The label is one of two classes, or a number: neither names an output.
        return ops.ones_like(leaves[0])
    if len(leaves) != 1 or len(leaves[0].shape) != 2 or labels is None or len(tree.flatten(labels)) != 1:
        raise ValueError(
            f'`{regularizer.name}` ({type(regularizer).__name__}) with target="label" needs one output (B, K) and '
            f"labels, class indices or one-hot. Received: outputs {[tuple(y.shape) for y in leaves]}, labels "
            f'{None if labels is None else "of another structure"}. Use target="predicted" where there are none.'
        )
    labels = ops.convert_to_tensor(tree.flatten(labels)[0])
    classes = leaves[0].shape[1]
    if len(labels.shape) == 2 and labels.shape[1] == classes:
        return ops.cast(labels, leaves[0].dtype)
    return class_cotangent(leaves[0], ops.cast(ops.reshape(labels, (-1,)), "int32"))


def _paths(layers: Any) -> list[str] | None:
    """The paths of layers, at least one; None for all of them."""
    found = checks.paths("layers", layers, optional=True)
    if found == []:
        raise checks.invalid("layers", "a list of paths of layers, one or more, or None for all of them", layers)
    return found
