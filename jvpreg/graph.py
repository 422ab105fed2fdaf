"""The walk over a Keras graph: it runs every operation's rule once and records the frozen nodes in order."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import ops, tree

from jvpreg.registry import Context, Pushforward, find_rule, missing_rule_error, unwrap


@dataclass(frozen=True)
class Value:
    """A primal value `(B, …)` on its way through the graph, and the slot that holds its tangent."""

    primal: Any
    slot: int


@dataclass(frozen=True)
class Node:
    """One operation, frozen at `x`.

    Attributes:
        name: path of the layer within the model; a layer's second use is `name:1`, its activation `name/activation`.
        operation: the layer or function.
        inputs: slots of the tangents it takes.
        output: slot of the tangent it gives.
        pushforward: the frozen operation.
        primal_inputs: its inputs at `x`, each `(B, …)`.
        primal: its output at `x`, `(B, …)`.
    """

    name: str
    operation: Any
    inputs: tuple[int, ...]
    output: int
    pushforward: Pushforward
    primal_inputs: tuple[Any, ...]
    primal: Any


@dataclass
class Tracer:
    """Runs a model once, rule by rule, and records its nodes in the order in which they ran."""

    context: Context
    nodes: list[Node] = field(default_factory=list)
    num_slots: int = 0
    _uses: dict[str, int] = field(default_factory=dict)

    def value(self, primal) -> Value:
        """A new value with a slot of its own."""
        self.num_slots += 1
        return Value(primal, self.num_slots - 1)

    def run(self, operation, *args, scope: str = "", **kwargs):
        """Runs one operation on `Value`s: a whole model is walked, anything else goes to its rule."""
        operation = unwrap(operation)
        if is_model(operation):
            return self._run_model(operation, args[0] if args else kwargs["inputs"], scope)
        return self._run_rule(operation, args, kwargs, scope)

    def _run_model(self, model, inputs, scope: str):
        if isinstance(model, keras.Sequential):
            value = inputs
            for layer in model.layers:
                value = self.run(layer, value, scope=f"{scope}{_name(layer)}/" if is_model(unwrap(layer)) else scope)
            return value

        def bind(operation):
            nested = is_model(unwrap(operation))
            inner = f"{scope}{_name(operation)}/" if nested else scope
            return lambda *args, **kwargs: self.run(operation, *args, scope=inner, **kwargs)

        # Private, and what `clone_model` itself runs on: Keras has no public way to run a graph with other
        # operations that takes shared layers, nested structures and bare operations alike.
        outputs = model._run_through_graph(flatten_inputs(model, inputs, "inputs"), operation_fn=bind)
        # A model with one output returns it bare, as Keras does.
        return outputs[0] if isinstance(outputs, (list, tuple)) and len(outputs) == 1 else outputs

    def _run_rule(self, operation, args, kwargs, scope: str) -> Value:
        name = self._unique(scope + _name(operation))
        rule = find_rule(operation)
        if rule is None:
            raise missing_rule_error(operation, name)
        if getattr(operation, "quantization_mode", None) is not None:
            raise NotImplementedError(
                f"`{name}` is quantized ({operation.quantization_mode}), and a rounded layer has no useful Jacobian. "
                "Linearize the model before it is quantized."
            )
        if kwargs.get("mask") is not None:
            raise NotImplementedError(
                f"`{name}` is called with a mask, which rules do not take. Multiply by the mask before the layer, or "
                "leave it out."
            )
        args, kwargs = self._with_constants(args, kwargs)
        values = [leaf for leaf in tree.flatten((args, kwargs)) if isinstance(leaf, Value)]
        dtype = _input_dtype(operation)
        cast_values = [_autocast(value.primal, dtype) for value in values]
        primals = iter(cast_values)
        args, kwargs = tree.map_structure(
            lambda leaf: next(primals) if isinstance(leaf, Value) else leaf, (args, kwargs)
        )
        kwargs = {key: value for key, value in kwargs.items() if key not in ("training", "mask")}
        primal, pushforward = rule.function(operation, *args, context=self.context, **kwargs)
        slots = tuple(value.slot for value in values)
        value = self._record(name, operation, slots, tuple(cast_values), primal, pushforward)
        activation = getattr(operation, rule.activation) if rule.activation else None
        if activation is not None and activation is not keras.activations.linear:
            value = self._run_activation(activation, value, f"{name}/activation")
        _record_activity_loss(operation, value.primal)
        return value

    def _with_constants(self, args, kwargs):
        """The constant tensors among an operation's inputs as values too; no tangent ever reaches their slots."""
        values = [leaf for leaf in tree.flatten((args, kwargs)) if isinstance(leaf, Value)]
        batch = ops.shape(values[0].primal)[0]

        def convert(leaf):
            if isinstance(leaf, Value) or not ops.is_tensor(leaf) or not len(leaf.shape):
                return leaf
            # One row stands for the batch: tangents of different batch sizes could not be folded alike.
            row = leaf.shape[0] == 1
            return self.value(ops.broadcast_to(leaf, (batch, *leaf.shape[1:])) if row else leaf)

        return tree.map_structure(convert, (args, kwargs))

    def _run_activation(self, activation, value: Value, name: str) -> Value:
        rule = find_rule(activation)
        if rule is None:
            raise missing_rule_error(activation, name)
        x = _autocast(value.primal, _input_dtype(activation))
        primal, pushforward = rule.function(activation, x, context=self.context)
        return self._record(name, activation, (value.slot,), (x,), primal, pushforward)

    def _record(self, name, operation, slots, primal_inputs, primal, pushforward) -> Value:
        value = self.value(primal)
        self.nodes.append(Node(name, operation, slots, value.slot, pushforward, primal_inputs, primal))
        return value

    def _unique(self, name: str) -> str:
        uses = self._uses.get(name, 0)
        self._uses[name] = uses + 1
        return f"{name}:{uses}" if uses else name


def is_model(operation) -> bool:
    """Whether an operation is a graph of others: a Sequential or functional model with Keras' own `call`."""
    graph = isinstance(operation, (keras.Sequential, keras.Function))
    return graph and type(operation).call.__module__.split(".")[0] == "keras"


def flatten_inputs(model, structure, argument: str) -> list:
    """The leaves of a structure like the model's input, in the order of `model.inputs`; a dict goes by name.

    Args:
        model: a model or layer.
        structure: a tensor, or a list, tuple or dict of them.
        argument: what the caller calls the structure, for the error.

    Raises:
        ValueError: their number or a name does not fit.
    """
    graph = _graph(model)
    if graph is None:
        return tree.flatten(structure)
    if isinstance(structure, dict):
        # Private: the only place where Keras keeps the names of a dict of inputs.
        struct = graph._inputs_struct
        names = sorted(struct) if isinstance(struct, dict) else [x.name for x in graph.inputs]
        missing = [name for name in names if name not in structure]
        if missing:
            raise ValueError(
                f"Invalid value for argument `{argument}`. Expected a dict with the keys {names}, the inputs of "
                f"`{model.name}`. Received: keys {list(structure)}; add {missing}."
            )
        structure = [structure[name] for name in names]
    leaves = tree.flatten(structure)
    if len(leaves) != len(graph.inputs):
        raise ValueError(
            f"Invalid value for argument `{argument}`. Expected {len(graph.inputs)} tensor(s), one for each input of "
            f"`{model.name}`. Received: {len(leaves)}. Pass a list in the order of `model.inputs`, or a dict by name."
        )
    return leaves


def standardize_inputs(model, x) -> list:
    """The model's inputs as a flat list of floating-point tensors, in the order of `model.inputs`.

    Raises:
        ValueError: a shape does not fit.
    """
    leaves = flatten_inputs(model, x, "x")
    if any(leaf is None for leaf in leaves):
        raise ValueError("Invalid value for argument `x`. Expected a tensor for each input. Received: None.")
    graph = _graph(model)
    expected = [None] * len(leaves) if graph is None else graph.inputs
    inputs = []
    for i, (leaf, spec) in enumerate(zip(leaves, expected, strict=True)):
        tensor = ops.convert_to_tensor(leaf, dtype=None if spec is None else spec.dtype)
        if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype)):
            # Bytes of an image: the same numbers as floats, since integers have no tangents.
            tensor = ops.cast(tensor, keras.config.floatx())
        if spec is not None:
            tensor = _adjust_rank(tensor, spec.shape)
            if not _compatible(tensor.shape, spec.shape):
                raise ValueError(
                    f"Invalid value for argument `x`{f' (input {i})' if len(leaves) > 1 else ''}. Expected shape "
                    f"{_readable(spec.shape)}, as input `{spec.name}` of `{model.name}` has. "
                    f"Received: x with shape {_readable(tensor.shape)}."
                )
        inputs.append(tensor)
    sizes = {tensor.shape[0] for tensor in inputs if len(tensor.shape) and isinstance(tensor.shape[0], int)}
    if len(sizes) > 1:
        raise ValueError(
            "Invalid value for argument `x`. Expected the same number of examples in every input. "
            f"Received: x with shapes {[tuple(tensor.shape) for tensor in inputs]}."
        )
    if graph is None:
        _check_input_spec(model, inputs)
    return inputs


def _graph(model):
    """The functional graph of a model, which a Sequential model keeps inside; None for a layer."""
    model = getattr(model, "_functional", model)
    return model if isinstance(model, keras.Function) else None


def _adjust_rank(tensor, expected):
    """As Keras: a last axis of size 1 may be left out, or be too many."""
    if len(tensor.shape) == len(expected) - 1 and expected[-1] == 1:
        return ops.expand_dims(tensor, -1)
    if len(tensor.shape) == len(expected) + 1 and tensor.shape[-1] == 1:
        return ops.squeeze(tensor, -1)
    return tensor


def _check_input_spec(layer, inputs) -> None:
    try:
        # Private, and what `Layer.__call__` checks first.
        layer._assert_input_compatibility(inputs if len(inputs) > 1 else inputs[0])
    except ValueError as error:
        raise ValueError(f"Invalid value for argument `x`. {error}") from error


def trace(model, inputs: Sequence, context: Context) -> tuple[Tracer, list[Value], Any]:
    """Runs `model` once on the flat list of `inputs` `(B, …)`.

    Returns:
        The tracer with its nodes, the values of the inputs, and the output values in the model's own structure.
    """
    tracer = Tracer(context)
    values = [tracer.value(tensor) for tensor in inputs]
    arguments = values if len(values) > 1 else values[0]
    if not isinstance(model, keras.Layer):
        return tracer, values, tracer.run(model, arguments)
    # Private: within Keras' own call context a model's losses of the last call are cleared, and of this one kept.
    model._get_call_context()
    try:
        return tracer, values, tracer.run(model, arguments)
    finally:
        model._maybe_reset_call_context()


def _compatible(shape, expected) -> bool:
    pairs = zip(shape, expected, strict=False)
    return len(shape) == len(expected) and all(a is None or b is None or a == b for a, b in pairs)


def _readable(shape) -> str:
    return "(" + ", ".join(["B", *("?" if size is None else str(size) for size in tuple(shape)[1:])]) + ")"


def _name(operation) -> str:
    return getattr(operation, "name", None) or operation.__name__


def _input_dtype(operation) -> str | None:
    """The dtype to which a layer casts its inputs (mixed precision), or None."""
    casts = isinstance(operation, keras.Layer) and operation.autocast
    return operation.compute_dtype if casts else None


def _autocast(primal, dtype):
    floating = keras.backend.is_float_dtype(keras.backend.standardize_dtype(primal.dtype))
    return ops.cast(primal, dtype) if dtype is not None and floating else primal


def _record_activity_loss(operation, primal) -> None:
    """What `Layer.__call__` does with an activity regularizer: its loss a batch, divided by the batch's size."""
    regularizer = getattr(operation, "activity_regularizer", None)
    if regularizer is not None:
        loss = regularizer(primal)
        operation.add_loss(loss / ops.cast(ops.shape(primal)[0], loss.dtype))
