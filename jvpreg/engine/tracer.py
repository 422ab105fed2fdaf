"""The walk over a Keras graph: it runs every operation's rule once and records the frozen nodes in order."""

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from jvpreg.common import keras_private
from jvpreg.common.eager import leaves_of, map_leaves
from jvpreg.engine import masks
from jvpreg.engine.arguments import (
    as_taken,
    autocast,
    computed_in,
    input_dtype,
    kind_of,
    map_arguments,
    parameters_of,
)
from jvpreg.engine.autodiff import LeftToAutodiff, fall_back
from jvpreg.engine.companions import Companions
from jvpreg.engine.frozen_graph import FrozenGraph, Returned
from jvpreg.engine.inputs import call_signature, flatten_inputs, graph_of
from jvpreg.engine.naming import OUTSIDE, Names, Scope
from jvpreg.engine.node import Node, Value
from jvpreg.engine.opening import Opened, calls_forgotten, is_bare, is_constant, open_up, reason_of
from jvpreg.engine.outputs import as_recorded, record_activity_losses, tensors_of
from jvpreg.engine.paths import is_graph, join, stable_name
from jvpreg.engine.running import Run
from jvpreg.rules.contract import Affine, Context, Declined, Pushed, checked_pair
from jvpreg.rules.control_flow import Body
from jvpreg.rules.families import identity
from jvpreg.rules.registry import find_rule, missing_rule_error, unwrap


@dataclass
class Tracer:
    """Runs a model once, rule by rule, and records its nodes in the order in which they ran.

    Attributes:
        context: what rules are told.
        nodes: what was recorded.
        variables: variables that operations took as an input, each with its value.
        returned: by the path of each layer, what it returned in each of its runs.
        fallbacks: the nodes that were left to autodiff, by name.
        companions: tangents that go through the model while it runs, if there are any.
        root: the model that runs, whose name is part of no path.
        moved: the path of a layer, and a function of what it returns, with whose values the model goes on.
        fallback: `"error"` if an operation without a rule that cannot be opened up is an error; otherwise it is left to
            the backend's autodiff.
        order: 2 if nodes are to have a second derivative; 1 otherwise.
    """

    context: Context
    companions: Companions | None = None
    root: Any = None
    fallback: str = "ignore"
    moved: tuple[str, Callable] | None = None
    order: int = 1
    nodes: list[Node] = field(default_factory=list)
    variables: list[tuple[Any, Value]] = field(default_factory=list)
    returned: dict[str, list] = field(default_factory=dict)
    fallbacks: dict[str, LeftToAutodiff] = field(default_factory=dict)
    num_slots: int = 0
    _names: Names = field(init=False)
    # Of the layer that is being opened up: the dtype to which it casts its weights, itself, and `Opened.kept`.
    _within: tuple = (None, None, {})

    def __post_init__(self):
        self._names = Names(self.root)
        # Tangents go along with the inputs of an operation, not with those of the operations within it.
        self.context = replace(self.context, along=Context.along, weights={})

    def value(self, primal, batched: bool = True) -> Value:
        """A new value with a slot of its own."""
        self.num_slots += 1
        return Value(primal, self.num_slots - 1, batched)

    def masked(self, primal, mask) -> Value:
        """A new value under a mask, which is a tensor or None."""
        return self.value(primal).with_mask(None if mask is None else self.value(mask))

    def run(self, operation, *args, scope: Scope = OUTSIDE, kind: str | None = None, **kwargs):
        """Runs one operation on `Value`s: by its rule, otherwise opened up into smaller ones, otherwise by autodiff."""
        operation = operation if is_constant(operation, args, kwargs) else unwrap(operation)
        graph = is_graph(operation)
        inner = scope if graph and operation is self.root else self._names.scope(operation, scope, kind)
        if graph:
            outputs = self._run_model(operation, args[0] if args else kwargs["inputs"], inner, kwargs.get("mask"))
        else:
            outputs = self._run_named(operation, args, kwargs, self._names.unique(inner.name))
        if isinstance(operation, keras.Layer) and operation is not self.root:
            if self.moved is not None and self.moved[0] in (inner.path, self._names.by_attributes(inner.path)):
                outputs = map_leaves(self.moved[1], outputs)
            self.returned.setdefault(inner.path, []).append(outputs)
        return outputs

    def _run_named(self, operation, args, kwargs, name: str):
        if getattr(operation, "quantization_mode", None) is not None:
            raise NotImplementedError(
                f"`{name}` is quantized ({operation.quantization_mode}), and a rounded layer has no useful Jacobian. "
                "Linearize the model before it is quantized."
            )
        if isinstance(operation, keras.Layer):
            kwargs = masks.fill_in(operation, args, kwargs)
        return self._with_masks(operation, args, kwargs, self._run_operation(operation, args, kwargs, name))

    def _run_operation(self, operation, args, kwargs, name: str):
        rule = find_rule(operation)
        if rule is not None:
            try:
                return self._run_rule(rule, operation, args, kwargs, name)
            except Declined as declined:
                if declined.to_autodiff or is_bare(operation):
                    return self._run_by_autodiff(operation, args, kwargs, name, declined)
        with calls_forgotten(operation):
            try:
                opened = open_up(operation, args, kwargs, self.context.training)
            except keras_private.MissingKerasNameError:
                raise
            except Exception as error:  # A user's call may raise anything when it is given symbols for tensors.
                return self._run_by_autodiff(operation, args, kwargs, name, error)
            return self._run_opened(opened, operation, args, kwargs, name)

    def _run_model(self, model, inputs, scope: Scope, mask=None):
        if mask is not None:
            pairs = zip(tree.flatten(inputs), tree.flatten(mask), strict=True)
            given = [
                x.with_mask(m if isinstance(m, Value) else self.value(m)) if m is not None else x for x, m in pairs
            ]
            inputs = tree.pack_sequence_as(inputs, given)
        if isinstance(model, keras.Sequential):
            value = inputs
            for layer in model.layers:
                value = self.run(layer, value, scope=scope)
            return value
        outputs = self._walk(model, flatten_inputs(model, inputs, "inputs"), scope)
        # A model with one output returns it bare, as Keras does.
        return outputs[0] if isinstance(outputs, (list, tuple)) and len(outputs) == 1 else outputs

    def _walk(self, graph, values: list, scope: Scope, opened: bool = False):
        def bind(operation):
            # Keras numbers the operations anew at each opening, so a node is named by its kind.
            kind = (stable_name if isinstance(operation, keras.Layer) else kind_of)(operation) if opened else None

            def run(*args, **kwargs):
                with self._training(kwargs.get("training") if opened else None):
                    outputs = self.run(operation, *args, scope=scope, kind=kind, **kwargs)
                    return as_recorded(outputs, self._within[2].get(id(operation)), self.value) if opened else outputs

            return run

        return keras_private.run_graph(graph, values, bind)

    @contextlib.contextmanager
    def _training(self, training):
        """A context in which layers run in the mode that a layer's `call` asked for, if it did."""
        outer = self.context
        if training is not None and bool(training) != outer.training:
            of_batch = "frozen" if outer.batch_statistics == "moving" else outer.batch_statistics
            statistics = of_batch if training else "moving"
            self.context = replace(outer, training=bool(training), batch_statistics=statistics)
        try:
            yield
        finally:
            self.context = outer

    def _run_rule(self, rule, operation, args, kwargs, name: str):
        args, kwargs = self._as_values(operation, args, kwargs)
        taken = parameters_of(rule.function)
        args, kwargs = as_taken(operation, args, kwargs, taken)
        given, kwargs = masks.split(operation, args, kwargs, taken)
        if not all(key in taken for key in given):
            raise NotImplementedError(
                f"`{name}` is called with a mask, which its rule does not take. Multiply by the mask before the layer, "
                "or leave it out."
            )
        args, kwargs = map_arguments(lambda leaf: computed_in(operation, leaf), args, kwargs)
        of = self if self.order == 1 else copy.copy(self)  # which stays as the tracer is now
        run = Run(rule, operation, given, of._primals, of._run_inner, self.context, self.companions)
        again = None if self.order == 1 else run.at_other_points(args, kwargs)
        values, returned = run(args, kwargs)
        primal, pushforward, image = self._carry_out(returned, values, name, operation)
        outputs = self._record(name, operation, values, primal, pushforward, image, again)
        activation = getattr(operation, rule.activation) if rule.activation else None
        if activation is not None and activation is not keras.activations.linear:
            outputs = self._run_named(activation, (outputs,), {}, f"{name}/activation")
        record_activity_losses(operation, outputs)
        return outputs

    def _carry_out(self, returned, values: Sequence[Value], name: str, operation) -> tuple:
        """From what a rule returned: the output, the pushforward, and the output's tangent if it is known already."""
        if not isinstance(returned, Affine):
            primal, pushforward = checked_pair(returned, name, operation)
            return primal, pushforward, pushforward.image if isinstance(pushforward, Pushed) else None
        if len(values) != 1:
            raise TypeError(
                f"The rule of `{name}` ({type(operation).__name__}) returned an Affine, which is of one input. "
                f"Received: {len(values)} inputs. Return (y, Pushforward)."
            )
        if self.companions is None:
            y, image = returned.linear_part(returned.residuals[0]), None
        else:
            y, image = self.companions.run(returned, values)
        return returned.with_bias(y, name), returned, image

    def _run_inner(self, known: Sequence[Value], repeated: bool, operation, *inputs, **kwargs):
        """Another operation as one pushforward: what `context.linearize` is in a rule, and `context.linearize_step`.

        Tangents are those of the `inputs`, which keep the masks that they have among the `known` values.
        """
        inner = Tracer(replace(self.context, repeated=repeated), fallback=self.fallback, fallbacks=self.fallbacks)
        if isinstance(operation, Body):
            return self._run_body(inner, known, operation, inputs)
        carried = {id(value.primal): value.mask.primal for value in known if value.mask is not None}
        values = tree.map_structure(lambda tensor: inner.masked(tensor, carried.get(id(tensor))), inputs)
        kwargs = tree.map_structure(lambda x: inner.value(x) if ops.is_tensor(x) and len(x.shape) else x, kwargs)
        outputs = inner.run(operation, *values, **kwargs)
        graph = inner.frozen(tree.flatten(values), tree.flatten(outputs))
        return tree.map_structure(lambda value: value.primal, outputs), graph.as_pushforward()

    def _run_body(self, inner: "Tracer", known: Sequence[Value], body: Body, inputs) -> tuple:
        """The body of a loop or branch as one pushforward. What it closes over may follow from weights alone."""
        inner._within = self._within
        constant = {id(value.primal) for value in known if not value.batched}
        batched = [i < body.num_arguments or id(tensor) not in constant for i, tensor in enumerate(inputs)]
        values = list(map(inner.value, map(ops.convert_to_tensor, inputs), batched))
        outputs = inner._walk(body.graph, values, OUTSIDE, opened=True)
        return [value.primal for value in outputs], inner.frozen(values, outputs).as_pushforward(body.of_elements)

    def frozen(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> FrozenGraph:
        """What was recorded, from `inputs` to `outputs`."""
        returned = Returned(self.returned, self._names.by_attributes)
        return FrozenGraph(self.nodes, inputs, outputs, self.variables, returned)

    def _run_opened(self, opened: Opened, layer, args, kwargs, name: str):
        dtype = input_dtype(layer)
        values = masks.values_among(args, kwargs)
        outer = self._within
        # A function within a layer's call is a part of it.
        self._within = (dtype, layer, opened.kept) if isinstance(layer, keras.Layer) else (*outer[:2], opened.kept)
        try:
            scope = self._names.within(layer, name)
            inputs = [*(self._cast(value, dtype, scope) for value in values), *map(self._weight, opened.weights)]
            inputs += [self.value(tensor, batched=False) for tensor in opened.constants]
            tensors, left, losses = self._walk(opened.graph, inputs, scope, opened=True)
        finally:
            self._within = outer
        values = [y.with_mask(y.mask if mask is y else mask) for y, mask in zip(tensors, left, strict=True)]
        for loss in losses:
            layer.add_loss(loss.primal)
        outputs = opened.filled(values)
        record_activity_losses(layer, outputs)
        return outputs

    def _cast(self, value: Value, dtype, scope: Scope) -> Value:
        """The value in the dtype in which a layer sees its input (mixed precision)."""
        primal = autocast(value, dtype)
        if primal is value.primal or primal.dtype == value.primal.dtype:
            return value
        name = self._names.unique(join(scope.name, "/", "cast"))
        cast = self._record(name, ops.cast, [replace(value, primal=primal)], primal, identity())
        return cast.with_mask(value.mask)

    def _run_by_autodiff(self, operation, args, kwargs, name: str, error: Exception):
        masks.check_seen(operation, args, kwargs, name)
        args, kwargs = self._as_values(operation, args, kwargs)
        values, args, kwargs = self._primals(operation, args, kwargs)
        if isinstance(operation, keras.Layer) and "training" in call_signature(operation).parameters:
            kwargs["training"] = self.context.training
        primal, pushforward = fall_back(operation, args, kwargs, [value.primal for value in values])
        if pushforward is not None:
            if self.fallback == "error":
                raise missing_rule_error(operation, name, reason_of(error)) from error
            expected = isinstance(error, Declined) and error.to_autodiff
            self.fallbacks[name] = LeftToAutodiff(type(operation).__name__, reason_of(error), expected)
        return self._record(name, operation, values, primal, pushforward, again=pushforward and pushforward.at)

    def _primals(self, operation, args, kwargs):
        """The `Value`s among the arguments as the operation sees them, and the arguments with their primals."""
        dtype = input_dtype(operation)
        values: list[Value] = []

        def primal(leaf):
            if not isinstance(leaf, Value):
                return leaf
            values.append(leaf if dtype is None else replace(leaf, primal=autocast(leaf, dtype)))
            return values[-1].primal

        return values, *map_arguments(primal, args, kwargs)

    def _with_masks(self, operation, args, kwargs, outputs):
        """The outputs with the masks that Keras leaves on them."""
        if not isinstance(operation, keras.Layer):
            # A tensor that is passed on as it is keeps its mask.
            kept = {id(value.primal): value.mask for value in masks.values_among(args, kwargs)}
            return map_leaves(lambda y: masks.under(y, kept.get(id(masks.primal_of(y)))), outputs)
        if not operation.supports_masking:
            return outputs
        first, mask = masks.first_argument(operation, args, kwargs), kwargs.get("mask")
        previous = masks.masks_of(first) if mask is None else mask
        if type(operation).compute_mask is keras.Layer.compute_mask and not masks.any_of(previous):
            return outputs
        values, (inputs,), _ = self._primals(operation, (first,), {})
        batched = any(value.batched for value in values)
        return masks.on_outputs(operation, inputs, previous, outputs, lambda mask: self.value(mask, batched))

    def _as_values(self, operation, args, kwargs):
        """Weights and constants among an operation's inputs become values too; no tangent ever reaches a constant."""

        def convert(leaf):
            if isinstance(leaf, Value):
                return leaf
            if isinstance(leaf, keras.Variable):
                return self._weight(leaf)
            layer = isinstance(operation, keras.Layer)
            # A NumPy scalar such as `np.float64` that Python takes for a float counts as a number, not as a tensor.
            if isinstance(leaf, (np.ndarray, np.generic)) and not isinstance(leaf, float) and not layer:
                leaf = ops.convert_to_tensor(leaf)
            if not ops.is_tensor(leaf) or (layer and not len(leaf.shape)):
                return leaf
            batched = [value.primal for value in masks.values_among(args, kwargs) if value.batched]
            if not layer or not batched:
                return self.value(leaf, batched=False)
            # In a layer one row may stand for the batch: it is repeated, so that all tangents have one batch size.
            row = leaf.shape[0] == 1
            return self.value(ops.broadcast_to(leaf, (ops.shape(batched[0])[0], *leaf.shape[1:])) if row else leaf)

        return map_arguments(convert, args, kwargs)

    def _weight(self, variable) -> Value:
        """The value of a weight that an operation takes as an input: the same one at each use with the same dtype."""
        with keras_private.weights_cast_to(self._within[0]):
            primal = ops.convert_to_tensor(variable.value)
        for known, value in self.variables:
            if known is variable and value.primal.dtype == primal.dtype:
                return value
        value = self.value(primal, batched=False)
        self.variables.append((variable, value))
        if self.companions is not None:
            self.companions.enter_weight(variable, value)
        return value

    def _record(self, name, operation, inputs: Sequence[Value], primal, pushforward, image=None, again=None):
        batched = any(value.batched for value in inputs)
        outputs = map_leaves(lambda leaf: self.value(leaf, batched), primal)
        examples = pushforward.examples if pushforward is not None and callable(pushforward.examples) else None
        if pushforward is not None and not any(value.has_tangents for value in leaves_of(outputs)):
            pushforward = None
        layer = operation if isinstance(operation, keras.Layer) else self._within[1]
        path = self._names.by_attributes(name)
        ends = tuple(inputs), tuple(leaves_of(outputs))
        node = Node(name, operation, *ends, pushforward, layer, examples, path, again=again)
        self.nodes.append(node)
        if self.companions is not None:
            self.companions.push(node, image)
        return outputs


def freeze(operation, *inputs, context: Context) -> tuple:
    """An operation's outputs, and the operation frozen at `inputs` as one pushforward."""
    return Tracer(context)._run_inner((), False, operation, *inputs)


def trace(
    model, x, inputs: Sequence, context: Context, companions: Companions | None = None, **options: Any
) -> tuple[Tracer, list[Value], Any]:
    """Runs `model` once on the flat list of `inputs` `(B, …)`, which the user gave as the structure `x`.

    The `options` are those of a `Tracer`.

    Returns:
        The tracer with its nodes, the values of the inputs, and the output values in the model's own structure.
    """
    batch = ops.shape(inputs[0])[0] if len(inputs[0].shape) else None
    tracer = Tracer(replace(context, batch=batch), companions, model, **options)
    given = [keras_private.get_mask(leaf) for leaf in flatten_inputs(model, x, "x")]
    values = [tracer.masked(tensor, mask) for tensor, mask in zip(inputs, given, strict=True)]
    if companions is not None:
        companions.enter(values)
    if is_graph(model):
        arguments = values if len(values) > 1 else values[0]
    else:
        graph = graph_of(model)
        arguments = tree.pack_sequence_as(x if graph is None else keras_private.input_structure(graph), values)
    if not isinstance(model, keras.Layer):
        return tracer, values, tracer.run(model, arguments)
    with keras_private.within_call(model):
        outputs = tracer.run(model, arguments, kind=None if find_rule(model) else stable_name(model))
    outputs = tensors_of(outputs)
    masks.leave_on(outputs)
    return tracer, values, outputs
