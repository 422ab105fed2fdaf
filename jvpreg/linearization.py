"""`Linearization`: a model frozen at `x`, and exact products with its Jacobian."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keras import ops, tree

from jvpreg.common import checks
from jvpreg.common.dtypes import as_floats, has_tangents
from jvpreg.common.typing import Structure, Tensor, WeightTangents
from jvpreg.engine import matrices
from jvpreg.engine.frozen_graph import FrozenGraph
from jvpreg.engine.node import Node
from jvpreg.engine.pullback import pull_back
from jvpreg.engine.tangents import (
    as_given,
    at_least_float32,
    check_count,
    each_name,
    flatten_like,
    pack_products,
    standardize_tangents,
    weight_pairs,
    weight_tangents,
    zeros,
)
from jvpreg.engine.twice_frozen import TwiceFrozenModel
from jvpreg.rules.examples import MIXED


class Linearization(TwiceFrozenModel):
    """A model frozen at `x`: `u ↦ J u`, `v ↦ Jᵀ v`, and what `f(x)` adds to `J x`. Made by `linearize`.

    Attributes:
        inputs: the model's inputs, a flat list of `(B, …)`, integers as floats. Integers (token ids, lengths, masks)
            have no derivative: beside other inputs their tangents and gradients are zero, and alone they are an error.
            Bytes stand for real numbers, as in images.
        outputs: `f(x)`, `(B, …)`, in the model's own structure; the primal pass ran once to get it.
        nodes: the frozen nodes, in the order in which they ran.
        fallbacks: a dict from the name of each node that was left to the backend's autodiff to the reason.
    """

    def jvp(
        self,
        u: Structure | None = None,
        weights: WeightTangents | None = None,
        taps: Mapping[str, Tensor] | None = None,
    ) -> Structure:
        """The pushforward: `J u`, and the derivative along directions of the weights and of nodes' outputs.

        Args:
            u: a tangent like `x`, or with a leading probe axis, `(P, B, …)`; a structure of them for several
                inputs, where None stands for zero.
            weights: tangents of weights, like each weight or with the same leading probe axis: a dict by the
                variables' paths, or a list of pairs `(variable, tangent)`, since Keras' variables cannot be keys; None
                stands for zero.
                Layers before the first one with a tangent cost nothing.
            taps: tangents added at the outputs of nodes, a dict from a name that `node_outputs` has.

        Returns:
            `J u + d/dε f(x; W + ε U)`, plus the pushforward of the taps; like the outputs, with a leading probe axis if
            `u` has one. In float32 at least.

        Raises:
            ValueError: a shape does not fit, or a weight is not one of the model's.

        Reference: Balestriero & Baraniuk (2021), equation 12 and appendix E, for the weights.
        """
        pairs = weight_pairs(weights)
        if u is None and not pairs and not taps:
            raise ValueError(
                "Invalid value for argument `u`. Expected a tangent, or `weights` or `taps`. Received: neither."
            )
        given = weight_tangents(pairs, self.weights)
        if taps is not None and not isinstance(taps, Mapping):
            raise checks.invalid("taps", "a dict from names of nodes to tangents, or None", taps)
        taps = dict(taps or {})
        made = self.node_outputs() if taps else {}
        unknown = [name for name in taps if name not in made]
        if unknown:
            raise ValueError(
                f"Invalid value for argument `taps`. Expected names among {list(made)}. Received: {', '.join(unknown)}"
            )
        flat = [None] * len(self.inputs) if u is None else self._flatten_inputs(u, "u")
        names = each_name("u", "x", len(self.inputs)) + [("weights", f"`{variable.path}`") for variable, _ in given]
        names += [("taps", f"`{name}`") for name in taps]
        like = [*self.inputs, *(ops.convert_to_tensor(variable) for variable, _ in given)]
        # Of a part of a batch, the nodes' outputs are still whole.
        whole = self._whole is None
        like += [made[name] if whole else ops.zeros(self.shape_at(name), made[name].dtype) for name in taps]
        if u is not None:
            check_count(flat, self.inputs, "u", "x")
            self._check_moving(flat, "u")
        tangents, probed = standardize_tangents(
            [*flat, *(tangent for _, tangent in given), *taps.values()], like, names
        )
        count, last = len(self.inputs), len(self.inputs) + len(given)
        taps = dict(zip(taps, tangents[last:], strict=True))
        along = [id(variable) for variable, _ in given]
        products = self._push(tangents[:count], taps, dict(zip(along, tangents[count:last], strict=True)))
        return pack_products(products, self.outputs, probed)

    def vjp(self, v: Structure) -> Structure:
        """The pullback `Jᵀ v`.

        Args:
            v: a cotangent like the outputs, or with a leading probe axis, `(P, B, …)`; a structure of them for
                several outputs, where None stands for zero.

        Returns:
            `Jᵀ v`, in the structure of `x`, with a leading probe axis if `v` has one. In float32 at least.

        Raises:
            ValueError: a shape does not fit.
        """
        self._check_moving(self.inputs, "x")
        return self.gradients(v, nodes=[])[0]

    def modified_vjp(self, v: Structure, change: Callable[[Node, list], list]) -> Structure:
        """The pullback node by node, the last node first, with `change` applied to the cotangents of each node.

        Args:
            v: a cotangent, as `vjp` takes it.
            change: a function `(node, cotangents) -> cotangents` of the node's outputs, `(P, B, …)` each, or None for
                zero; P is 1 if `v` has no probe axis.

        Returns:
            What `vjp` returns; without a change it is the same.

        Raises:
            ValueError: a shape does not fit, or `change` is no function.

        Example:

        >>> import keras, numpy as np, jvpreg
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.ReLU()])
        >>> lin = jvpreg.linearize(model, np.ones((1, 2)))
        >>> def positive(node, cotangents):
        ...     return [keras.ops.maximum(v, 0.0) for v in cotangents]
        >>> keras.ops.convert_to_numpy(lin.modified_vjp(np.array([[3.0, -1.0]]), positive)).tolist()
        [[3.0, 0.0]]
        """
        checks.function("change", change, "a function (node, cotangents) -> cotangents")
        self._check_moving(self.inputs, "x")
        cotangents, probed = self._cotangents(v)
        pulled, _ = self._graph.pull(cotangents, change, self._part_size)
        count = next(ops.shape(c)[0] for c in cotangents if c is not None)
        filled = [zeros(count, x) if t is None else t for t, x in zip(pulled, self.inputs, strict=True)]
        return self.pack_inputs(as_given(filled, probed))

    def _cotangents(self, v: Structure) -> tuple[list, bool]:
        """A flat list `(P, B, …)` like the outputs, None for zero, and whether the probe axis was there."""
        outputs = as_floats(tree.flatten(self.outputs))
        flat = flatten_like(v, self.outputs, "v")
        check_count(flat, outputs, "v", "the outputs")
        return standardize_tangents(flat, outputs, each_name("v", "the outputs", len(outputs)))

    def gradients(
        self, v: Structure, nodes: Sequence[str] | None = None, with_inputs: bool = True
    ) -> tuple[Structure, dict[str, Tensor]]:
        """`Jᵀ v`, and the gradient of `vᵀ f` with respect to the outputs of nodes, all in one backward pass.

        Args:
            v: a cotangent, as `vjp` takes it.
            nodes: names of nodes, as `intercepts` has them; all of those by default.
            with_inputs: whether to compute `Jᵀ v`; otherwise the layers before the nodes cost nothing.

        Returns:
            What `vjp` returns (None without the inputs), and a dict from node name to the gradient, like the node's
            output (see `by_example` where its first axis is not the batch), with a leading probe axis if `v` has one.

        Raises:
            ValueError: a shape does not fit, or there is no such node.

        Example:

        >>> import keras, numpy as np, jvpreg
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, name="first"), keras.layers.Dense(2)])
        >>> lin = jvpreg.linearize(model, np.ones((5, 3)))
        >>> at_input, at_nodes = lin.gradients(np.ones((5, 2)), ["first"])
        >>> tuple(at_input.shape), tuple(at_nodes["first"].shape)
        ((5, 3), (5, 4))
        """
        cotangents, probed = self._cotangents(v)
        known = self.node_outputs()
        nodes = checks.names("nodes", nodes, optional=True)
        with_inputs = checks.boolean("with_inputs", with_inputs)
        if unknown := [name for name in nodes or [] if name not in known]:
            raise ValueError(
                f"Invalid value for argument `nodes`. Expected names among {list(known)}. "
                f"Received: {', '.join(unknown)}"
            )
        names = list(known) if nodes is None else list(nodes)
        mixed = [name for name in names if known[name].shape[:1] != self.inputs[0].shape[:1]]
        mixed = [name for name in mixed if self._place_of(name) == MIXED]
        if mixed and self._whole is None:
            raise ValueError(
                f"There is no gradient of each example at `{mixed[0]}`, which returned {tuple(known[mixed[0]].shape)}: "
                f"its entries depend on several of the {ops.shape(self.inputs[0])[0]} examples. Name other `nodes`."
            )
        of_inputs, of_nodes = pull_back(self, cotangents, names, with_inputs)
        at_inputs = self.pack_inputs(as_given(of_inputs, probed)) if with_inputs else None
        at_nodes = [at_least_float32(gradient if probed else gradient[0]) for gradient in of_nodes]
        return at_inputs, dict(zip(names, at_nodes, strict=True))

    def bias_jacobians(
        self, v: Structure, nodes: Sequence[str] | None = None, with_inputs: bool = True
    ) -> tuple[Structure, dict[str, Tensor]]:
        """`Jᵀ v`, and the bias-Jacobians of nodes: `∂(vᵀ f)/∂y ⊙ c`, y being a node's output and c its intercept.

        With `⟨x, Jᵀ v⟩`, those of all nodes sum to `vᵀ f(x)`.

        Args:
            v: a cotangent, as `vjp` takes it.
            nodes: names of nodes, as `intercepts` has them; all of those by default.
            with_inputs: whether to compute `Jᵀ v`; otherwise the layers before the nodes cost nothing.

        Returns:
            What `vjp` returns (None without the inputs), and a dict from node name to the bias-Jacobian, like the
            node's output with the examples first, `(B, …)`; each with a leading probe axis if `v` has one.

        Raises:
            ValueError: a shape does not fit, or there is no such node.

        Reference: Srinivas & Fleuret (2018), "Full-Jacobian Representation of Neural Networks", section 3.2.

        Example:

        >>> import keras, numpy as np, jvpreg
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, bias_initializer="ones", name="last")])
        >>> lin = jvpreg.linearize(model, np.ones((1, 3)))
        >>> _, biases = lin.bias_jacobians(np.array([[1.0, 0.0]]))
        >>> keras.ops.convert_to_numpy(biases["last"]).tolist()
        [[1.0, 0.0]]
        """
        intercepts = self.intercepts_of(nodes)
        names = list(intercepts) if nodes is None else list(nodes)
        at_inputs, gradients = self.gradients(v, names, with_inputs)
        found = {}
        for name in names:
            product = gradients[name] * ops.cast(intercepts[name], gradients[name].dtype)
            probed = len(product.shape) > len(intercepts[name].shape)
            found[name] = self.by_example(name, product, probed)
        return at_inputs, found

    def gains(self, u: Structure) -> dict[str, Tensor]:
        """By how much each node stretches the tangent that comes to it, when `J u` goes through the model.

        Args:
            u: a tangent like `x`, or with a leading probe axis, as `jvp` takes it.

        Returns:
            A dict from node name to `‖out‖ / ‖in‖`, `(P,)`, each norm over all inputs or outputs of the node and the
            whole batch; 0 for a node to which a zero tangent comes. Nodes that no tangent can reach are left out.

        Raises:
            ValueError: a shape does not fit.

        Example:

        >>> import keras, numpy as np, jvpreg
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Rescaling(3.0), keras.layers.ReLU()])
        >>> gains = jvpreg.linearize(model, np.array([[1.0, -1.0]])).gains(np.array([[4.0, 3.0]]))
        >>> [round(float(keras.ops.convert_to_numpy(gain)[0]), 4) for gain in gains.values()]
        [3.0, 0.8]
        """
        known = self.tangents_by_slot(u)
        gains = {}
        for node in self.nodes:
            into, out = ([known[v.slot] for v in side if v.slot in known] for side in (node.inputs, node.outputs))
            if into and out:
                before = _norm(into)
                gains[node.name] = ops.where(before > 0, _norm(out) / ops.where(before > 0, before, 1.0), before)
        return gains

    def tangents_by_slot(self, u: Structure) -> dict[int, Tensor]:
        """The tangents `(P, B, …)` inside the model from `u` to `J u`, by the `slot` of the values of `nodes`.

        Args:
            u: a tangent like `x`, or with a leading probe axis, as `jvp` takes it.

        Returns:
            A dict without those values that no tangent reaches.

        Raises:
            ValueError: a shape does not fit.
        """
        flat = self._flatten_inputs(u, "u")
        check_count(flat, self.inputs, "u", "x")
        tangents, _ = standardize_tangents(flat, self.inputs, each_name("u", "x", len(self.inputs)))
        made = [value for node in self.nodes for value in node.outputs]
        graph = FrozenGraph(self.nodes, self._graph.inputs, made, [])
        values = [
            *zip(self._graph.inputs, tangents, strict=True),
            *zip(made, graph.push(tangents, self._part_size), strict=True),
        ]
        return {value.slot: tangent for value, tangent in values if tangent is not None}

    def jacobian(self, chunk_size: int = 64) -> Structure:
        """The whole Jacobian of each example, computed in chunks of rows or of columns, whichever are fewer.

        Args:
            chunk_size: how many products are computed at once; a smaller number takes less memory.

        Returns:
            `(B, *output, *input)`. For several inputs, a structure like `x` of them; for several outputs, a structure
            like the outputs of these.

        Raises:
            ValueError: the chunk size is not a positive integer, or the examples of the batch are coupled.

        Reference: Balestriero & Baraniuk (2021), proposition 1.
        """
        chunk_size = checks.count("chunk_size", chunk_size)
        if self.couples_examples:
            raise ValueError(
                "A linearization that couples the examples of a batch has no Jacobian of each. Use "
                '`batch_statistics="frozen"` or "moving", and no operation that mixes examples; with `after` and '
                "`block`, name a layer that has the examples on its first axis."
            )
        self._check_moving(self.inputs, "x")
        outputs = tree.flatten(self.outputs)
        rows = matrices.materialize(self.inputs, outputs, self._push, self._pull, chunk_size)
        return tree.pack_sequence_as(self.outputs, list(map(self.pack_inputs, rows)))

    def affine_map(self, chunk_size: int = 64) -> tuple[Structure, Structure]:
        """The slope `A = J` and the intercept `b = f(x) − J x` of each example.

        If the model is piecewise affine, `A x + b` is the model itself in the whole region around `x`.

        Args:
            chunk_size: as in `jacobian`.

        Returns:
            `A`, as `jacobian` returns it, and `b`, like the outputs.

        Reference: Balestriero & Baraniuk (2021), proposition 1.
        """
        slope = self.jacobian(chunk_size)
        at_x = self._push([ops.expand_dims(x, 0) for x in self.inputs])
        pairs = zip(tree.flatten(self.outputs), at_x, strict=True)
        intercepts = [y - ju[0] if has_tangents(y) else y for y, ju in pairs]
        return slope, tree.pack_sequence_as(self.outputs, intercepts)

    def linear_operator(self, example: int = 0) -> Any:
        """The Jacobian (K, D) of one example as a `scipy.sparse.linalg.LinearOperator`, for `svds`, `eigs` or `lsqr`.

        Several inputs or outputs are one long vector each, in their order. Nothing is materialized.

        Args:
            example: its index in the batch.

        Raises:
            ValueError: there is no such example.
            ImportError: SciPy is not installed.
        """
        checks.packages("linear_operator", "scipy", "scipy")
        batch = int(ops.shape(self.inputs[0])[0])
        if not checks.is_integer(example) or not -batch <= example < batch:
            raise checks.invalid("example", f"an index of a batch of {batch}", example)
        part = self if batch == 1 else self.take([example % batch])
        return matrices.linear_operator(part.inputs, tree.flatten(part.outputs), part._push, part._pull)


def _norm(tangents: list) -> Tensor:
    """The norm of all entries of tangents `(P, …)` together, `(P,)`."""
    flat = [at_least_float32(ops.reshape(t, (ops.shape(t)[0], -1))) for t in tangents]
    joined = flat[0] if len(flat) == 1 else ops.concatenate(flat, axis=-1)
    # In units of the largest entry: its square may overflow.
    largest = ops.max(ops.abs(joined), axis=-1)
    unit = ops.where(largest > 0, largest, 1.0)
    return unit * ops.sqrt(ops.sum(ops.square(joined / ops.expand_dims(unit, -1)), axis=-1))
