"""`linearize`: a model frozen at `x`, and exact products with its Jacobian."""

import dataclasses
import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import keras
from keras import ops, tree

from jvpreg.graph import Node, flatten_inputs, is_model, standardize_inputs, trace
from jvpreg.registry import Context, find_rule, missing_rule_error, unwrap
from jvpreg.transpose import transpose

BatchStatistics = Literal["moving", "frozen", "coupled"]

_warned_of_head: "weakref.WeakSet[Any]" = weakref.WeakSet()


def linearize(model, x, training: bool = False, batch_statistics: BatchStatistics | None = None) -> "Linearization":
    """Runs a model once at `x` and freezes it there: masks, argmaxes, slopes and statistics.

    Args:
        model: a functional or Sequential Keras model, or a layer that has a rule, built.
        x: the model's input, `(B, …)`, or a structure of inputs such as the model takes.
        training: whether dropout is active and moving averages are updated (once, by this call).
        batch_statistics: what batch normalization uses. `"moving"`: its moving averages (the default when not
            training). `"frozen"`: the statistics of this batch, held constant for the tangents but not for the
            weights (the default in training). `"coupled"`: the same, moving with the batch: the true derivative of
            the batch map, in which one example's tangent depends on the others'.

    Returns:
        A `Linearization`: `.outputs`, `.jvp(u)`, `.vjp(v)`, `.intercepts`.

    Raises:
        NotImplementedError: an operation has no rule, or the model has no graph.
        ValueError: an argument does not fit.

    Derivatives are those of the output as it is; a model that ends in softmax or sigmoid gets one warning, since
    the Jacobian of the logits is what is usually meant. `ReLU'(0) = 0`; a max-pool tie goes to the first entry.

    Reference: Balestriero & Baraniuk (2021), "Fast Jacobian-Vector Product for Deep Networks", section 3.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, activation="relu"), keras.layers.Dense(2)])
    >>> lin = jvpreg.linearize(model, np.ones((5, 3)))
    >>> tuple(lin.jvp(np.ones((5, 3))).shape), tuple(lin.jvp(np.ones((7, 5, 3))).shape)
    ((5, 2), (7, 5, 2))
    >>> tuple(lin.vjp(np.ones((5, 2))).shape)
    (5, 3)
    """
    model = unwrap(model)
    _check_model(model)
    if batch_statistics is None:
        batch_statistics = "frozen" if training else "moving"
    if batch_statistics not in ("moving", "frozen", "coupled"):
        raise ValueError(
            'Invalid value for argument `batch_statistics`. Expected "moving", "frozen", "coupled" or None. '
            f"Received: batch_statistics={batch_statistics!r}"
        )
    inputs = standardize_inputs(model, x)
    tracer, values, outputs = trace(model, inputs, Context(bool(training), batch_statistics))
    output_slots = [value.slot for value in tree.flatten(outputs)]
    _warn_of_probabilities(model, [node for node in tracer.nodes if node.output in output_slots])
    return Linearization(
        nodes=tracer.nodes,
        inputs=inputs,
        input_slots=[value.slot for value in values],
        outputs=tree.map_structure(lambda value: value.primal, outputs),
        output_slots=output_slots,
        flatten=functools.partial(flatten_inputs, model),
    )


def jvp(model, x, u, **kwargs):
    """`f(x)` and `J u`. Shapes and keyword arguments as in `linearize` and `Linearization.jvp`.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> y, ju = jvpreg.jvp(model, np.zeros((1, 3)), np.ones((1, 3)))
    """
    linearization = linearize(model, x, **kwargs)
    return linearization.outputs, linearization.jvp(u)


def vjp(model, x, v, **kwargs):
    """`f(x)` and `Jᵀ v`. Shapes and keyword arguments as in `linearize` and `Linearization.vjp`.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> y, jtv = jvpreg.vjp(model, np.zeros((1, 3)), np.ones((1, 2)))
    """
    linearization = linearize(model, x, **kwargs)
    return linearization.outputs, linearization.vjp(v)


class Linearization:
    """A model frozen at `x`: `u ↦ J u`, `v ↦ Jᵀ v`, and what `f(x)` has beside `J x`. Made by `linearize`.

    Attributes:
        inputs: the model's inputs, a flat list of `(B, …)`.
        outputs: `f(x)`, `(B, …)`, in the model's own structure; the primal pass ran once to get it.
        nodes: the frozen nodes, in the order in which they ran.
    """

    def __init__(self, nodes: Sequence[Node], inputs: list, input_slots, outputs, output_slots, flatten: Callable):
        self.nodes = list(nodes)
        self.inputs = inputs
        self.outputs = outputs
        self._input_slots = list(input_slots)
        self._output_slots = list(output_slots)
        self._flatten_inputs = flatten
        # How a part of a batch gets its intercepts: from the whole.
        self._whole: Callable[[], dict[str, Any]] | None = None

    def jvp(self, u):
        """The pushforward `J u`.

        Args:
            u: a tangent like `x`, or with a leading probe axis, `(P, B, …)`; a structure of them for several
                inputs, where None stands for zero.

        Returns:
            `J u`, like the outputs, with a leading probe axis if `u` has one. In float32 at least.

        Raises:
            ValueError: a shape does not fit.
        """
        tangents, probed = self._standardize(self._flatten_inputs(u, "u"), self.inputs, "u", "x")
        products = self._push(tangents)
        return self._pack(products, self.outputs, probed)

    def vjp(self, v):
        """The pullback `Jᵀ v`.

        Args:
            v: a cotangent like the outputs, or with a leading probe axis, `(P, B, …)`; a structure of them for
                several outputs, where None stands for zero.

        Returns:
            `Jᵀ v`, like `x` (a list for several inputs), with a leading probe axis if `v` has one. In float32 at
            least.

        Raises:
            ValueError: a shape does not fit.
        """
        outputs = tree.flatten(self.outputs)
        cotangents, probed = self._standardize(v, outputs, "v", "the outputs")
        leading = next(ops.shape(c)[:2] for c in cotangents if c is not None)
        cotangents = [_zeros(leading, y) if c is None else c for c, y in zip(cotangents, outputs, strict=True)]
        products = transpose(self._push, [_zeros(leading, x) for x in self.inputs], cotangents)
        structure = self.inputs[0] if len(self.inputs) == 1 else self.inputs
        return self._pack(products, structure, probed)

    @property
    def intercepts(self) -> dict[str, Any]:
        """What each node adds beside its linear part: `c = y − pushforward(x)`, a dict from node name to `(B, …)`.

        The bias of an affine layer, the implicit bias of batch normalization, `σ(x) − σ'(x)·x` of a smooth
        activation. Pushed to the output from where they arise, they sum with `J x` to `f(x)`.

        Reference: Srinivas & Fleuret, "Full-Jacobian Representation of Neural Networks", section 3.2.
        """
        if self._whole is not None:
            return self._whole()
        fed = {*self._input_slots, *(node.output for node in self.nodes)}

        def intercept(node):
            # A constant among a node's inputs has no tangent: what it adds belongs to the intercept.
            pairs = zip(node.inputs, node.primal_inputs, strict=True)
            tangents = [x if slot in fed else ops.zeros_like(x) for slot, x in pairs]
            return node.primal - self._push_node(node, tangents)[0]

        return {node.name: intercept(node) for node in self.nodes}

    def take(self, indices) -> "Linearization":
        """The linearization of the examples at `indices`, an integer vector `(N,)`, only. Nothing is run again.

        Raises:
            ValueError: the linearization couples the examples of the batch.
        """
        if any(node.pushforward.couples_examples for node in self.nodes):
            raise ValueError(
                'A linearization with `batch_statistics="coupled"` cannot be cut: each example\'s tangent depends '
                'on the whole batch. Use "frozen" or "moving".'
            )

        def cut(tensor):
            return ops.take(tensor, indices, axis=0)

        # Only what is frozen is cut; the primal values inside stay whole, for only their shapes are asked for.
        part = Linearization(
            [dataclasses.replace(node, pushforward=node.pushforward.take(indices)) for node in self.nodes],
            [cut(x) for x in self.inputs],
            self._input_slots,
            tree.map_structure(cut, self.outputs),
            self._output_slots,
            self._flatten_inputs,
        )
        part._whole = lambda: {name: cut(intercept) for name, intercept in self.intercepts.items()}
        return part

    def _push(self, tangents: Sequence, taps: dict[str, Any] | None = None) -> list:
        """The tangent pass: input tangents `(P, B, …)` (None: zero) and taps by node name, to output tangents."""
        slots = dict(zip(self._input_slots, tangents, strict=True))
        last_use = {slot: i for i, node in enumerate(self.nodes) for slot in node.inputs}
        leading = next(ops.shape(t)[:2] for t in [*tangents, *(taps or {}).values()] if t is not None)
        for i, node in enumerate(self.nodes):
            arguments = [slots.get(slot) for slot in node.inputs]
            tangent = None
            if any(argument is not None for argument in arguments):
                pairs = zip(arguments, node.primal_inputs, strict=True)
                filled = [_zeros(leading, primal) if t is None else t for t, primal in pairs]
                tangent = self._run_pushforward(node, filled)
            if taps and node.name in taps:
                tangent = taps[node.name] if tangent is None else tangent + taps[node.name]
            slots[node.output] = tangent
            for slot in node.inputs:
                if last_use[slot] == i and slot not in self._output_slots:
                    slots.pop(slot, None)
        pairs = zip(self._output_slots, tree.flatten(self.outputs), strict=True)
        return [_zeros(leading, y) if slots[slot] is None else slots[slot] for slot, y in pairs]

    def _push_node(self, node: Node, tangents: Sequence):
        """One node's pushforward of tangents without a probe axis, `(B, …)`, with the axis put on."""
        return self._run_pushforward(node, [ops.expand_dims(tangent, 0) for tangent in tangents])

    @staticmethod
    def _run_pushforward(node: Node, tangents: Sequence):
        # Mixed precision: a tangent has the dtype in which the layer sees its input.
        cast = [ops.cast(t, primal.dtype) for t, primal in zip(tangents, node.primal_inputs, strict=True)]
        tangent = node.pushforward(*cast)
        expected, received = (*cast[0].shape[:2], *node.primal.shape[1:]), tuple(tangent.shape)
        if len(expected) != len(received) or any(
            a is not None and b is not None and a != b for a, b in zip(expected, received, strict=True)
        ):
            raise ValueError(
                f"The rule of `{node.name}` ({type(node.operation).__name__}) returned a tangent of the wrong shape. "
                f"Expected {expected}, probes first and then like its output. Received: {received}. "
                "Check the rule with `jvpreg.testing.check_rule`."
            )
        return ops.cast(tangent, node.primal.dtype)

    @staticmethod
    def _standardize(vectors, like: list, name: str, like_name: str) -> tuple[list, bool]:
        """Flat tangents `(P, B, …)` with the dtypes of `like`, and whether the probe axis was there."""
        flat = tree.flatten(vectors)
        if len(flat) != len(like):
            raise ValueError(
                f"Invalid value for argument `{name}`. Expected {len(like)} tensor(s), one for each of {like_name}. "
                f"Received: {len(flat)}."
            )
        if all(vector is None for vector in flat):
            raise ValueError(f"Invalid value for argument `{name}`. Expected at least one tensor. Received: None.")
        tangents: list = []
        ranks = set()
        for vector, x in zip(flat, like, strict=True):
            if vector is None:
                tangents.append(None)
                continue
            tangent = ops.convert_to_tensor(vector, dtype=x.dtype)
            extra = len(tangent.shape) - len(x.shape)
            shape = tuple(tangent.shape)[extra:] if extra >= 0 else ()
            fits = all(a is None or b is None or a == b for a, b in zip(shape, x.shape, strict=False))
            if extra not in (0, 1) or not fits:
                raise ValueError(
                    f"Invalid value for argument `{name}`. Expected shape {tuple(x.shape)}, like {like_name}, or "
                    f"(P, {str(tuple(x.shape))[1:-1]}) with a leading axis of P probes. "
                    f"Received: {name} with shape {tuple(tangent.shape)}."
                )
            ranks.add(extra)
            tangents.append(tangent if extra else ops.expand_dims(tangent, 0))
        if len(ranks) > 1 or len({t.shape[0] for t in tangents if t is not None}) > 1:
            raise ValueError(
                f"Invalid value for argument `{name}`. Expected the same number of probes in every tensor. "
                f"Received: shapes {[tuple(v.shape) for v in flat if v is not None]}."
            )
        return tangents, ranks == {1}

    @staticmethod
    def _pack(products: list, structure, probed: bool):
        products = [_at_least_float32(product if probed else product[0]) for product in products]
        return tree.pack_sequence_as(structure, products)


def _zeros(leading, like):
    """Zero tangents of `like` (B, …), with the `leading` axes (P, N) for N examples."""
    return ops.zeros((*leading, *ops.shape(like)[1:]), dtype=like.dtype)


def _at_least_float32(tensor):
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return ops.cast(tensor, "float32") if dtype in ("float16", "bfloat16") else tensor


def _check_model(model) -> None:
    if isinstance(model, keras.Model) and not is_model(model) and find_rule(model) is None:
        raise NotImplementedError(
            f"`{model.name}` ({type(model).__name__}) has no graph to walk: its `call` is custom. Expected a "
            "functional or Sequential model, or a layer with a rule. Build it with `keras.Model(inputs, outputs)`, or "
            "register a rule for it with `jvpreg.register_rule`."
        )
    if not isinstance(model, keras.Operation):
        raise ValueError(
            "Invalid value for argument `model`. Expected a Keras model or layer. "
            f"Received: model={model!r} (of type {type(model).__name__})"
        )
    if not is_model(model) and find_rule(model) is None:
        raise missing_rule_error(model, model.name)
    if not getattr(model, "built", True):
        raise ValueError(
            f"Invalid value for argument `model`. Expected a built model. Received: `{model.name}`, which has no "
            "weights yet. Call it on a batch, or give it a `keras.Input`, first."
        )


def _warn_of_probabilities(model, heads: Sequence[Node]) -> None:
    if not isinstance(model, keras.Model) or model in _warned_of_head:
        return
    for head in heads:
        function = getattr(head.operation, "activation", head.operation)
        if isinstance(function, keras.layers.Softmax) or function in (
            keras.activations.softmax,
            keras.activations.sigmoid,
        ):
            _warned_of_head.add(model)
            warnings.warn(
                f"`{model.name}` ends in a {getattr(function, '__name__', 'softmax')} (`{head.name}`): its Jacobian is "
                "that of the probabilities, which vanishes where the model is sure. For the Jacobian of the logits, "
                "leave the activation out and compile with a loss that has `from_logits=True`.",
                stacklevel=3,
            )
            return
