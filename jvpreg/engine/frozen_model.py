"""A model frozen at `x`: its nodes, what it adds, its parts, and the two passes over it."""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops, tree

from jvpreg.common import checks
from jvpreg.common.eager import leaves_of
from jvpreg.common.typing import ArrayLike, Structure, Tensor
from jvpreg.engine.frozen_graph import FrozenGraph
from jvpreg.engine.node import Node, Value, tangent_shape
from jvpreg.engine.paths import is_within, unknown
from jvpreg.engine.pullback import pull_back
from jvpreg.engine.tangents import zeros
from jvpreg.rules.examples import FIRST, Place

PATH = "the path of a layer, or the beginning of several up to a slash or dot"


class FrozenModel:
    """A model frozen at `x`, as `Linearization` makes products of it; that says what its attributes are.

    Args:
        graph: the frozen graph.
        inputs: the model's inputs, a flat list of `(B, …)`, integers as floats.
        outputs: `f(x)`, in the model's own structure.
        flatten: `flatten(structure, argument)` returns the leaves of a structure like `x`; errors name the argument.
        fallbacks: by name, why nodes were left to autodiff.
        pack: `pack(leaves)` returns a structure like `x` of a flat list like `inputs`; by default there is one input.

    Attributes:
        order: 2 if the model was linearized with `order=2`, which second derivatives need; 1 otherwise.
    """

    order = 1

    def __init__(
        self,
        graph: FrozenGraph,
        inputs: list,
        outputs: Structure,
        flatten: Callable,
        fallbacks: Mapping[str, str] | None = None,
        pack: Callable | None = None,
    ):
        self.inputs = inputs
        self.outputs = outputs
        self.fallbacks = dict(fallbacks or {})
        self._graph = graph
        self._flatten_inputs = flatten
        self._pack_inputs = pack or operator.itemgetter(0)
        # A part of a batch cuts its intercepts out of those of the whole.
        self._whole: Callable[[Sequence[str] | None], dict[str, Tensor]] | None = None

    @property
    def given_inputs(self) -> list:
        """The inputs of the whole batch as layers take them, a flat list: as `inputs`, but integers stay integers."""
        return [value.primal for value in self._graph.inputs]

    def pack_inputs(self, leaves: Sequence) -> Structure:
        """A structure like `x` of a flat list like `inputs`, for example of directions.

        Raises:
            ValueError: the list is longer or shorter.
        """
        if not isinstance(leaves, (list, tuple)) or len(leaves) != len(self.inputs):
            raise checks.invalid("leaves", f"a list of {len(self.inputs)}, one for each of the model's inputs", leaves)
        return self._pack_inputs(leaves)

    def flatten_inputs(self, structure: Structure, argument: str = "structure") -> list:
        """The leaves of a structure like `x`, for example of a product, as a flat list like `inputs`.

        Raises:
            ValueError: it has other names, or another number of leaves; the error names the `argument`.
        """
        return self._flatten_inputs(structure, argument)

    def nodes_after_input(self, place: int) -> list[Node]:
        """The nodes that depend on one of the `inputs`, in the order in which they ran.

        Raises:
            ValueError: there is no such input.
        """
        checks.count("place", place, least=0, most=len(self.inputs) - 1)
        reached, found = {self._graph.inputs[place].slot}, []
        for node in self.nodes:
            if any(value.slot in reached for value in node.inputs):
                reached |= {value.slot for value in node.outputs}
                found.append(node)
        return found

    @property
    def nodes(self) -> list[Node]:
        """The frozen nodes, in the order in which they ran."""
        return self._graph.nodes

    @property
    def is_constant(self) -> bool:
        """Whether the Jacobian is zero whatever the weights are, for example if all inputs are integers."""
        return self._graph.is_constant

    @property
    def couples_examples(self) -> bool:
        """Whether one example's tangent depends on another's, or the outputs have the examples on another axis."""
        return self._graph.couples_examples

    @property
    def weights(self) -> list:
        """The variables that `jvp` can perturb, in the order of their first use."""
        return self._graph.weights

    @property
    def _part_size(self) -> int | Tensor | None:
        """The number of examples if this is a part of a batch; None for the whole batch."""
        return None if self._whole is None else ops.shape(self.inputs[0])[0]

    @property
    def intercepts(self) -> dict[str, Tensor]:
        """What each node adds to its linear part: `c = y − pushforward(x)`, a dict from node name to `(B, …)`.

        It is the bias of an affine layer, the implicit bias of batch normalization, `σ(x) − σ'(x)·x` of a smooth
        activation. Each is pushed from its node to the output; with `J x` they then sum to `f(x)`.

        Reference: Srinivas & Fleuret, "Full-Jacobian Representation of Neural Networks", section 3.2.
        """
        return self.intercepts_of(None)

    def intercepts_of(self, nodes: Sequence[str] | None) -> dict[str, Tensor]:
        """The `intercepts` of nodes of these names only, at the cost of these only; None: of all."""
        nodes = checks.names("nodes", nodes, optional=True)
        known = [name for node in self.nodes for name in node.output_names]
        if not set(nodes or ()) <= set(known):
            raise checks.invalid("nodes", f"names among {known}", nodes)
        return self._graph.intercepts(nodes) if self._whole is None else self._whole(nodes)

    def node_outputs(self, layers: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The outputs of nodes to which a tangent can be added, a dict from name to `(B, …)`.

        Args:
            layers: paths of layers or blocks, as `block` takes them; all nodes by default.

        Raises:
            ValueError: there is no such layer.
        """
        layers = checks.names("layers", layers, optional=True)
        chosen = self.nodes if layers is None else [n for path in layers for n in self.nodes_of(path, "layers")]
        found = {name: value for node in chosen for name, value in _named_outputs(node)}
        return {name: value.primal for name, value in found.items() if value.batched and value.has_tangents}

    def shape_at(self, name: str, batch: int | Tensor | None = None) -> tuple:
        """The shape of a node's output for a batch of this size; by default for as many examples as there are here.

        Raises:
            ValueError: there is no such output.
        """
        value = self._value_of(name)
        batch = self._part_size if batch is None else batch
        return tangent_shape((1, batch, self._graph.places), value)[1:]

    def by_example(self, name: str, tensor: Tensor, probed: bool = False) -> Tensor:
        """A tensor like a node's output, with the axis of the examples first: `(B, …)`.

        Within a `TimeDistributed` layer, or between a transpose and the one that undoes it, the examples of a node's
        output are on another axis. If other axes were merged into it, they are separated again and come after it.

        Args:
            name: of the node's output.
            tensor: for example the gradient at the output, or its intercept.
            probed: whether it has a leading axis for the probes, which stays the first.

        Raises:
            ValueError: there is no such output, or the tensor is not like it.
        """
        axis, before, after, _ = self._place_of(name)
        tensor, expected = checks.tensor("tensor", tensor), self._value_of(name).primal.shape
        if len(tensor.shape) != len(expected) + checks.boolean("probed", probed):
            raise checks.invalid("tensor", f"one like the node's output, of shape {tuple(expected)}", tensor)
        axis, first = axis + probed, int(probed)
        if axis <= first and before * after == 1:
            return tensor
        if before * after != 1:
            shape = ops.shape(tensor)
            tensor = ops.reshape(tensor, (*shape[:axis], before, -1, after, *shape[axis + 1 :]))
            axis += 1
        return ops.moveaxis(tensor, axis, first)

    def from_examples(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor with the axis of the examples first, `(P, B, …)`, like a node's output: `by_example` undone.

        Args:
            name: of the node's output.
            tensor: for example random numbers, drawn example by example, with a leading axis for the probes.

        Raises:
            ValueError: there is no such output, or the tensor is not like it.
        """
        axis, before, after, _ = self._place_of(name)
        merged, rank = before * after != 1, len(self._value_of(name).primal.shape)
        tensor = checks.tensor("tensor", tensor)
        if len(tensor.shape) != rank + 1 + 2 * merged:
            raise checks.invalid("tensor", "one like what `by_example` returns, with a probe axis before it", tensor)
        if axis <= 0 and not merged:
            return tensor
        shape = self.shape_at(name, ops.shape(tensor)[1])
        return ops.reshape(ops.moveaxis(tensor, 1, axis + 1 + merged), (ops.shape(tensor)[0], *shape))

    @functools.cached_property
    def _values(self) -> dict[str, Value]:
        return {name: value for node in self.nodes for name, value in _named_outputs(node)}

    def _place_of(self, name: str) -> Place:
        return self._graph.places.get(self._value_of(name).slot, FIRST)

    def _value_of(self, name: str) -> Value:
        found = self._values.get(name) if isinstance(name, str) else None
        if found is None:
            raise checks.invalid("name", f"one of {list(self._values)}", name)
        return found

    def take(self, indices: ArrayLike) -> Self:
        """The linearization of the examples at `indices`, an integer vector `(N,)`, only. Nothing is run again.

        Raises:
            ValueError: the linearization couples the examples of the batch, or moves them to another axis; or the
                indices are not such a vector.
        """
        if self.couples_examples:
            raise ValueError(
                "A linearization that couples the examples of a batch cannot be cut: each example's tangent depends on "
                'the whole batch. Use `batch_statistics="frozen"` or "moving", and no operation that mixes examples; '
                "with `after` and `block`, name a layer that has the examples on its first axis."
            )
        moving = [node.name for node in self._graph.moving]
        if moving:
            raise ValueError(
                "A linearization that moves the examples of a batch from its first axis cannot be cut where something "
                "is frozen. Reshape to (batch, ...), not to (-1, ...), which may merge other axes into the first, and "
                f"transpose back before other operations. Received: `{moving[0]}`."
            )
        given = indices
        indices = checks.tensor("indices", indices)
        if len(indices.shape) != 1 or "int" not in keras.backend.standardize_dtype(indices.dtype):
            raise ValueError(
                "Invalid value for argument `indices`. Expected a vector (N,) of integers, the indices of examples. "
                f"Received: shape {tuple(indices.shape)} of {keras.backend.standardize_dtype(indices.dtype)}."
            )
        batch = self.inputs[0].shape[0]
        if not ops.is_tensor(given) and isinstance(batch, int):  # A step has tensors, whose values are not read.
            known = np.asarray(given)
            if not known.size or known.min() < -batch or known.max() >= batch:
                raise checks.invalid("indices", f"at least one index of a batch of {batch}", given)
            indices = ops.convert_to_tensor(known % batch)

        def cut(tensor: Tensor) -> Tensor:
            return ops.take(tensor, indices, axis=0)

        part = type(self)(
            self._graph.take(indices),
            [cut(x) for x in self.inputs],
            tree.map_structure(cut, self.outputs),
            self._flatten_inputs,
            self.fallbacks,
            self._pack_inputs,
        )

        def whole(names: Sequence[str] | None) -> dict[str, Tensor]:
            found = self.intercepts_of(names).items()
            return {name: ops.take(value, indices, axis=self._place_of(name).axis) for name, value in found}

        part._whole = whole
        return part

    def after(self, layer: str) -> Self:
        """The Jacobian of the outputs with respect to a layer's output, at the same `x`. Nothing is run again.

        Args:
            layer: the path of a layer, or of a block of them, as `nodes` has it.

        Returns:
            A `Linearization` from the layer's output to the model's. Paths that bypass the layer are held constant.

        Raises:
            ValueError: there is no such layer, or it has several outputs.

        Example:

        >>> import keras, numpy as np, jvpreg
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, name="first"), keras.layers.Dense(2)])
        >>> lin = jvpreg.linearize(model, np.ones((5, 3)))
        >>> tuple(lin.after("first").jvp(np.ones((5, 4))).shape), tuple(lin.block("first").jvp(np.ones((5, 3))).shape)
        ((5, 2), (5, 4))
        """
        return self._after(self._output_of(layer, self.nodes_of(layer)))

    def _after(self, value: Value) -> Self:
        """As `after`, with respect to a value among the outputs of the nodes."""
        makers = [i for i, node in enumerate(self.nodes) if any(made.slot == value.slot for made in node.outputs)]
        return self._part(self.nodes[max(makers, default=-1) + 1 :], value, self._graph.outputs, self.outputs)

    def block(self, layer: str) -> Self:
        """The Jacobian of a layer's output, or of a block's, with respect to its own input, at the same `x`.

        Args:
            layer: the path of a layer, or of a block of them, as `nodes` has it.

        Returns:
            A `Linearization` from the block's input to its output.

        Raises:
            ValueError: there is no such layer, or it has several inputs or outputs.
        """
        nodes = self.nodes_of(layer)
        output = self._output_of(layer, nodes)
        made = {value.slot for node in nodes for value in node.outputs}
        entering = {v.slot: v for node in nodes for v in node.inputs if v.batched and v.slot not in made}
        if len(entering) != 1:
            raise ValueError(
                f"Invalid value for argument `layer`. Expected a layer or block with one input. Received: {layer!r}, "
                f"which has {len(entering)}."
            )
        return self._part(nodes, next(iter(entering.values())), [output], output.primal)

    def nodes_of(self, layer: str, argument: str = "layer", expected: str = PATH, owner: str = "") -> list[Node]:
        """The nodes of a layer (its activation is one of them), or of the layers of a block, in their order.

        Args:
            layer: the path of a layer, or of a block of them, as `jvpreg.layer_paths` has it, or by attributes alone.
            argument: what the caller calls the path, for the error.
            expected: what the caller expects, in words.
            owner: whose argument it is, if its name alone does not tell.

        Raises:
            ValueError: there is no such layer.

        Example:

        >>> import keras, numpy as np, jvpreg
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activation="relu", name="hidden")])
        >>> [node.name for node in jvpreg.linearize(model, np.ones((1, 3))).nodes_of("hidden")]
        ['hidden', 'hidden/activation']
        """
        checks.text(argument, layer)
        found = [node for node in self.nodes if is_within(node.name, layer) or is_within(node.path, layer)]
        if not found:
            raise unknown(argument, layer, [node.name for node in self.nodes], expected, owner)
        return found

    def _output_of(self, layer: str, nodes: Sequence[Node]) -> Value:
        """What a layer returned if it ran once; otherwise what the last of its nodes did."""
        runs = self._graph.returned.runs_of(layer)
        returned = leaves_of(runs[0]) if len(runs) == 1 else nodes[-1].outputs
        found = [leaf for leaf in returned if isinstance(leaf, Value)]
        if len(found) != 1:
            raise ValueError(
                f"Invalid value for argument `layer`. Expected a layer with one output. Received: {layer!r}, which has "
                f"{len(found)}."
            )
        return found[0]

    def _part(self, nodes: list[Node], start: Value, ends: list[Value], outputs: Structure) -> Self:
        if self._whole is not None:
            raise ValueError("Expected the linearization of a whole batch: call `after` or `block` first, then `take`.")
        graph = FrozenGraph(nodes, [start], ends, self._graph.variables)
        names = {node.name for node in nodes}
        fallbacks = {name: reason for name, reason in self.fallbacks.items() if name in names}
        part = type(self)(graph, [start.primal], outputs, lambda structure, argument: [structure], fallbacks)
        part.order = self.order
        return part

    def _pull(self, cotangents: Sequence) -> list:
        """The transpose of the tangent pass: cotangents `(P, B, …)` of every output, to those of the inputs."""
        return pull_back(self, cotangents)[0]

    def _push(
        self,
        tangents: Sequence,
        taps: dict[str, Tensor] | None = None,
        weights: Mapping[int, Tensor] | None = None,
        **options: Any,
    ) -> list:
        """The tangent pass: input tangents `(P, B, …)` (None: zero) and taps by node name, to output tangents."""
        products = self._graph.push(tangents, self._part_size, taps=taps, weights=weights, **options)
        given = [*tangents, *(taps or {}).values(), *(weights or {}).values()]
        count = next(ops.shape(t)[0] for t in given if t is not None)
        pairs = zip(products, tree.flatten(self.outputs), strict=True)
        return [zeros(count, y) if product is None else product for product, y in pairs]


def _named_outputs(node: Node) -> Iterable[tuple[str, Value]]:
    return zip(node.output_names, node.outputs, strict=True)
