"""The full-Jacobian: the contributions of the input and of every source of bias to an output."""

import functools
import math
from dataclasses import dataclass
from typing import Literal, Unpack

import keras
import numpy as np
from keras import layers, ops, tree

from jvpreg.common import checks
from jvpreg.common.dtypes import has_tangents
from jvpreg.common.typing import DType, Structure, Tensor
from jvpreg.engine.finite import finite_examples, nan_unless
from jvpreg.engine.node import Node
from jvpreg.engine.tangents import check_count, flatten_like
from jvpreg.linearization import Linearization
from jvpreg.products import Options, linearize

Source = Literal["bias", "normalization", "other"]

NORMALIZATIONS = (
    layers.BatchNormalization,
    layers.GroupNormalization,
    layers.LayerNormalization,
    layers.Normalization,
    layers.RMSNormalization,
    layers.UnitNormalization,
)


@dataclass(frozen=True)
class FullJacobian:
    """`vᵀ f(x) = ⟨x, Jᵀ v⟩ + Σ_l Σ bias_jacobians[l]`, exactly, for each example.

    Attributes:
        inputs: x, `(B, …)`, in the structure in which it was given.
        outputs: `f(x)`.
        input_jacobian: `Jᵀ v`, like `inputs`.
        bias_jacobians: a dict from node name to its contributions `∂(vᵀ f)/∂y_l ⊙ c_l`, `(B, …)` like the node's
            output, where `c_l` is the node's intercept. The examples are on the first axis, even if the node's output
            has them on another one, as within `TimeDistributed`.
        sources: a dict from node name to the kind of its intercept: `"bias"` of a layer with a bias, `"normalization"`,
            or `"other"`: what a nonlinearity leaves over, or a constant that is added.
        target_output: `vᵀ f(x)`, `(B,)`.
    """

    inputs: Structure
    outputs: Structure
    input_jacobian: Structure
    bias_jacobians: dict[str, Tensor]
    sources: dict[str, Source]
    target_output: Tensor

    def from_input(self) -> Tensor:
        """What the input contributes, `⟨x, Jᵀ v⟩`: `(B,)`."""
        pairs = zip(tree.flatten(self.inputs), tree.flatten(self.input_jacobian), strict=True)
        return sum(_sum_of_each(ops.cast(x, gradient.dtype) * gradient) for x, gradient in pairs)

    def from_biases(self, source: Source | None = None) -> Tensor:
        """What the biases contribute, all of them or those of one kind: `(B,)`."""
        checks.choice("source", source, ("bias", "normalization", "other", None))
        found = [_sum_of_each(c) for name, c in self.bias_jacobians.items() if source in (None, self.sources[name])]
        return sum(found, ops.zeros_like(self.target_output))

    def completeness_error(self) -> Tensor:
        """The difference of the output and the sum of contributions, relative to all their sizes: `(B,)`."""
        parts = [self.from_input(), *(_sum_of_each(c) for c in self.bias_jacobians.values())]
        size = sum(ops.abs(part) for part in parts)
        return ops.abs(sum(parts) - self.target_output) / ops.where(size > 0, size, 1.0)


def full_jacobian(
    model: keras.Layer | Linearization,
    x: Structure | None,
    target: Structure | None = None,
    at: str | None = None,
    **kwargs: Unpack[Options],
) -> FullJacobian:
    """The full-Jacobian of each example: what the input and every source of bias contribute to one output.

    Exact for every network, smooth ones included: the intercept of a smooth activation is a source of bias too.

    Args:
        model: a Keras model or layer, or a `Linearization`.
        x: its input, `(B, …)`; None for a `Linearization`.
        target: which output: a class for the whole batch, an integer, for an output `(B, K)`; a class for each example,
            integers `(B,)`; a cotangent like the outputs; or None for the largest output of each example.
        at: the path of a layer, as `jvpreg.linearize` takes it: what it returned stands for the input, for example the
            embeddings of tokens.
        **kwargs: of `jvpreg.linearize`.

    Returns:
        A `FullJacobian`. It costs one primal pass, one tangent pass node by node, and one backward pass. If an input or
        an output of an example is not finite, all results for this example are NaN.

    Raises:
        ValueError: an argument does not fit.

    Reference: Srinivas & Fleuret (2018), "Full-Jacobian Representation of Neural Networks", equation 1 and section 3.2.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, activation="relu", name="hidden"),
    ...     keras.layers.Dense(2, name="last")])
    >>> full = jvpreg.full_jacobian(model, np.ones((5, 3)))
    >>> sorted(full.bias_jacobians), tuple(full.input_jacobian.shape)
    (['hidden', 'hidden/activation', 'last'], (5, 3))
    >>> bool(keras.ops.all(full.completeness_error() < 1e-5))
    True
    """
    if isinstance(model, Linearization) and (x is not None or at is not None or kwargs):
        raise checks.invalid("x", "None, and no options, beside a `Linearization`", x if x is not None else kwargs)
    linearization = model if isinstance(model, Linearization) else linearize(model, x, at=at, **kwargs)
    cotangent = as_cotangent(linearization.outputs, target)
    at_input, biases = linearization.bias_jacobians(cotangent)
    nodes = {name: node for node in linearization.nodes for name in node.output_names}
    dtype = tree.flatten(at_input)[0].dtype
    known = functools.partial(nan_unless, finite_examples(linearization))
    return FullJacobian(
        inputs=linearization.pack_inputs(linearization.inputs),
        outputs=linearization.outputs,
        input_jacobian=tree.map_structure(known, at_input),
        bias_jacobians={name: known(contribution) for name, contribution in biases.items()},
        sources={name: _source(nodes[name]) for name in biases},
        target_output=known(target_output(cotangent, linearization.outputs, dtype)),
    )


def target_output(cotangent: Structure, outputs: Structure, dtype: DType) -> Tensor:
    """`vᵀ f(x)`, `(B,)`. As in `Jᵀ v`, integers do not count."""
    pairs = zip(tree.flatten(cotangent), tree.flatten(outputs), strict=True)
    parts = [(v, y) for v, y in pairs if v is not None and has_tangents(y)]
    return sum(_sum_of_each(ops.cast(v, dtype) * ops.cast(y, dtype)) for v, y in parts)


def as_cotangent(outputs: Structure, target: Structure | None) -> Structure:
    """The cotangent of a target: see `full_jacobian`.

    Raises:
        ValueError: the target does not fit the outputs.
    """
    leaves = tree.flatten(outputs)
    first = leaves[0]
    has_classes = len(leaves) == 1 and len(first.shape) == 2
    if target is None:
        if not has_classes:
            raise ValueError(
                "Invalid value for argument `target`. Expected a cotangent like the outputs, which have not the shape "
                f"(B, K) of one number for each class. Received: None, for outputs {[tuple(y.shape) for y in leaves]}"
            )
        return ops.one_hot(ops.argmax(first, axis=-1), first.shape[1], dtype=first.dtype)
    if has_classes:
        given = target[0] if outputs is not first and isinstance(target, (list, tuple)) and len(target) == 1 else target
        cotangent = _of_classes(given, first)
        if cotangent is not None:
            return cotangent if outputs is first else tree.pack_sequence_as(outputs, [cotangent])
    flat = flatten_like(target, outputs, "target")
    check_count(flat, leaves, "target", "the outputs")
    cast = [None if v is None else _like(v, y) for v, y in zip(flat, leaves, strict=True)]
    return tree.pack_sequence_as(outputs, cast)


def class_cotangent(outputs: Tensor, labels: Tensor) -> Tensor:
    """The cotangent of class indices `(B,)` for outputs `(B, K)`; NaN if there is no such class.

    It is for labels in a compiled step, which cannot be checked: with zeros, training would silently learn nothing.
    """
    valid = ops.logical_and(labels >= 0, labels < outputs.shape[1])
    rows = ops.one_hot(ops.cast(ops.where(valid, labels, 0), "int32"), outputs.shape[1], dtype=outputs.dtype)
    return ops.where(ops.expand_dims(valid, -1), rows, math.nan)


def _of_classes(target: Structure, outputs: Tensor) -> Tensor | None:
    """The cotangent of one class for all examples, or of one for each; None where the target is none of these."""
    batch, count = outputs.shape
    if checks.is_integer(target):
        checks.classes("target", np.asarray(target), count)
        target = np.full(batch, target) if batch is not None else ops.full((ops.shape(outputs)[0],), int(target))
    indices = checks.tensor("target", target)
    if "int" not in keras.backend.standardize_dtype(indices.dtype):
        return None
    if len(indices.shape) == 2 and indices.shape[1] == 1 and count != 1:
        indices = ops.squeeze(indices, axis=1)
    if len(indices.shape) != 1:
        return None
    if None not in (batch, indices.shape[0]) and indices.shape[0] != batch:
        raise checks.invalid("target", f"an index for each of the {batch} examples", target)
    checks.classes("target", indices, count)
    return class_cotangent(outputs, indices)


def _like(target: Structure, output: Tensor) -> Tensor:
    """A cotangent in the dtype of the output."""
    cotangent = checks.tensor("target", target)
    pairs = zip(cotangent.shape, output.shape, strict=False)
    if len(cotangent.shape) != len(output.shape) or any(None not in pair and pair[0] != pair[1] for pair in pairs):
        raise checks.invalid(
            "target", f"class indices, integers (B,), or a cotangent like the outputs, {tuple(output.shape)}", target
        )
    return ops.cast(cotangent, output.dtype)


def _source(node: Node) -> Source:
    if isinstance(node.layer, NORMALIZATIONS):
        return "normalization"
    return "bias" if getattr(node.layer, "bias", None) is not None else "other"


def _sum_of_each(tensor: Tensor) -> Tensor:
    """The sum of all entries of each example: `(B, …)` to `(B,)`."""
    return ops.sum(ops.reshape(tensor, (ops.shape(tensor)[0], -1)), axis=-1)
