"""The walk over a Keras graph: it runs every operation's rule once and records the frozen nodes in order."""

import contextlib
import functools
import inspect
import re
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from jvpreg import masks
from jvpreg.autodiff import fall_back
from jvpreg.companions import Companions
from jvpreg.eager import leaves_of, map_leaves
from jvpreg.engine import keras_private
from jvpreg.engine.keras_private import core, numpy_ops
from jvpreg.frozen import FrozenGraph, Node, Value
from jvpreg.inputs import call_signature, flatten_inputs, graph_of, has_tangents
from jvpreg.paths import is_graph, is_within, join, stable_name, walk
from jvpreg.rules.contract import Affine, Context, Declined, Pushed, Pushforward
from jvpreg.rules.families import identity
from jvpreg.rules.registry import find_rule, missing_rule_error, unwrap


@dataclass(frozen=True)
class LeftToAutodiff:
    """Why a node was left to the backend's autodiff.

    Attributes:
        kind: the class of its operation.
        reason: in words.
        expected: whether it is meant to be, and nobody needs to be told.
    """

    kind: str
    reason: str
    expected: bool

    def __str__(self):
        return f"{self.kind}: {self.reason}"


@dataclass(frozen=True)
class Scope:
    """What is being run, for the names of what runs in it.

    Attributes:
        name: as its nodes have it: `encoder:1` at the second use.
        path: as `layer_paths` has it: `encoder`.
    """

    name: str = ""
    path: str = ""


@dataclass
class Tracer:
    """Runs a model once, rule by rule, and records its nodes in the order in which they ran.

    Attributes:
        context: what rules are told.
        nodes: what was recorded.
        variables: variables that operations took as an input, each with its value.
        fallbacks: the nodes that were left to autodiff, by name.
        companions: tangents that go through the model while it runs, if there are any.
        root: the model that runs, whose name is part of no path.
        fallback: `"error"` if an operation without a rule that cannot be opened up is an error; otherwise it is left to
            the backend's autodiff.
    """

    context: Context
    companions: Companions | None = None
    root: Any = None
    fallback: str = "allow"
    nodes: list[Node] = field(default_factory=list)
    variables: list[tuple[Any, Value]] = field(default_factory=list)
    fallbacks: dict[str, LeftToAutodiff] = field(default_factory=dict)
    num_slots: int = 0
    _uses: dict[str, int] = field(default_factory=dict)
    # The names of layers by their `id`, and how attributes reach those that have a name of the user's.
    _names: dict[int, str] = field(default_factory=dict)
    _attributes: dict[str, str] = field(default_factory=dict)
    _walked: set[int] = field(default_factory=set)
    # The layer that is being opened up, and the dtype to which it casts its weights.
    _weight_dtype: str | None = None
    _opened: Any = None

    def __post_init__(self):
        # What goes along with an operation's inputs does not with those of the operations within it.
        self.context = replace(self.context, along=Context.along, weights={})

    def value(self, primal, batched: bool = True) -> Value:
        """A new value with a slot of its own."""
        self.num_slots += 1
        return Value(primal, self.num_slots - 1, batched)

    def masked(self, primal, mask) -> Value:
        """A new value under a mask, which is a tensor or None."""
        return self.value(primal).with_mask(None if mask is None else self.value(mask))

    def run(self, operation, *args, scope: Scope = Scope(), kind: str | None = None, **kwargs):
        """Runs one operation on `Value`s: by its rule, or opened up into smaller ones, or else by autodiff."""
        operation = unwrap(operation)
        if is_graph(operation):
            inner = scope if operation is self.root else self._scope(operation, scope, kind)
            return self._run_model(operation, args[0] if args else kwargs["inputs"], inner, kwargs.get("mask"))
        return self._run_named(operation, args, kwargs, self._unique(self._scope(operation, scope, kind).name))

    def _scope(self, operation, scope: Scope, kind: str | None) -> Scope:
        """What an operation is called that runs in a scope."""
        path = self._names.get(id(operation))
        if path is None:
            own = kind or _name(operation)
            path = join(scope.path, "/", own)
            if isinstance(operation, keras.Layer):
                self._names[id(operation)] = path
        # Where a layer runs for the second time, so do those in it. One that is shared belongs where it was found.
        within = bool(scope.path) and is_within(path, scope.path)
        return Scope(scope.name + path[len(scope.path) :] if within else path, path)

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
                if declined.to_autodiff or _is_bare(operation):
                    return self._run_by_autodiff(operation, args, kwargs, name, declined)
        with _forgotten(operation):
            try:
                graph, weights = self._open(operation, args, kwargs)
            except keras_private.MissingKerasNameError:
                raise
            except Exception as error:  # Whatever a call of one's own raises when it is given symbols for tensors.
                return self._run_by_autodiff(operation, args, kwargs, name, error)
            return self._run_opened(graph, weights, operation, args, kwargs, name)

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
            # Opened up anew each time, an operation is numbered anew by Keras: it goes by its kind.
            kind = (stable_name if isinstance(operation, keras.Layer) else _kind)(operation) if opened else None

            def run(*args, **kwargs):
                with self._training(kwargs.get("training") if opened else None):
                    return self.run(operation, *args, scope=scope, kind=kind, **kwargs)

            return run

        return keras_private.run_graph(graph, values, bind)

    @contextlib.contextmanager
    def _training(self, training):
        """Within it, layers run in the mode that a call within a layer's `call` asks for, if it does."""
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
        taken = _parameters(rule.function)
        args, kwargs = _as_taken(operation, args, kwargs, taken)
        given, kwargs = masks.split(operation, args, kwargs, taken)
        if not all(key in taken for key in given):
            raise NotImplementedError(
                f"`{name}` is called with a mask, which its rule does not take. Multiply by the mask before the layer, "
                "or leave it out."
            )
        args, kwargs = _map_arguments(lambda leaf: _computed_in(operation, leaf), args, kwargs)
        values, args, kwargs = self._primals(operation, args, kwargs)
        kwargs |= {key: map_leaves(masks.primal_of, mask) for key, mask in given.items()}
        kwargs = {key: value for key, value in kwargs.items() if key != "training" and value is not None}
        context = replace(self.context, linearize=functools.partial(self._run_inner, values))
        if self.companions is not None:
            context = self.companions.context(context, values)
        returned = rule.function(operation, *args, context=context, **kwargs)
        primal, pushforward, image = self._carry_out(returned, values, name, operation)
        outputs = self._record(name, operation, values, primal, pushforward, image)
        activation = getattr(operation, rule.activation) if rule.activation else None
        if activation is not None and activation is not keras.activations.linear:
            outputs = self._run_activation(activation, outputs, f"{name}/activation")
        _record_activity_loss(operation, outputs)
        return outputs

    def _carry_out(self, returned, values: Sequence[Value], name: str, operation) -> tuple:
        """The output, the pushforward, and the output's tangent if it is known already, of what a rule returned."""
        if not isinstance(returned, Affine):
            primal, pushforward = _checked_pair(returned, name, operation)
            return primal, pushforward, pushforward.image if isinstance(pushforward, Pushed) else None
        if self.companions is None:
            return returned.with_bias(returned.linear_part(returned.residuals[0])), returned, None
        y, image = self.companions.run(returned, values)
        return y, returned, image

    def _run_inner(self, known: Sequence[Value], operation, *inputs, **kwargs):
        """What a rule asks for by `context.linearize`: another operation, as one pushforward.

        Tangents are those of the `inputs`, which keep the masks that they have among the `known` values.
        """
        inner = Tracer(self.context, fallback=self.fallback, fallbacks=self.fallbacks)
        carried = {id(value.primal): value.mask.primal for value in known if value.mask is not None}
        values = tree.map_structure(lambda tensor: inner.masked(tensor, carried.get(id(tensor))), inputs)
        kwargs = tree.map_structure(lambda x: inner.value(x) if ops.is_tensor(x) and len(x.shape) else x, kwargs)
        outputs = inner.run(operation, *values, **kwargs)
        graph = inner.frozen(tree.flatten(values), tree.flatten(outputs))
        return tree.map_structure(lambda value: value.primal, outputs), graph.as_pushforward()

    def frozen(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> FrozenGraph:
        """What was recorded, from `inputs` to `outputs`."""
        return FrozenGraph(self.nodes, inputs, outputs, self.variables)

    def _open(self, layer, args, kwargs):
        """A layer's `call`, or a function, as a graph of smaller operations: by a call with symbols for its tensors."""
        if _is_bare(layer):
            raise NotImplementedError("the operation has no rule")
        dtype = _input_dtype(layer)

        def symbol(value):
            return _symbol(_autocast(value, dtype))

        # With symbols for its own weights too, what is made of them is part of the graph.
        owned = {key: value for key, value in _attributes(layer).items() if isinstance(value, keras.Variable)}
        with _seeds_put_back(layer) as put_back:
            try:
                with _symbols_for_weights(layer, owned, dtype) as weights:
                    symbols, inputs = masks.symbols(args, kwargs, symbol)
                    graph = keras_private.function([*inputs, *weights], self._call(layer, symbols, dtype))
            except Exception:
                # A call that reads `weight.value`, or assigns to it.
                put_back()
                owned = {}
                symbols, inputs = masks.symbols(args, kwargs, symbol)
                graph = keras_private.function(inputs, self._call(layer, symbols, dtype))
            _check_operations(graph)
        return graph, list(owned.values())

    def _call(self, layer, symbols, dtype):
        """The symbolic outputs of a layer's own `call`, and the masks that it left on them: see `masks.left_on`."""
        args, kwargs = symbols
        if not isinstance(layer, keras.Layer):
            return masks.left_on(layer(*args, **kwargs))
        # What Keras passes itself, whether a call takes it or not.
        takes = call_signature(layer).parameters
        kwargs = {key: value for key, value in kwargs.items() if key not in ("training", "mask") or key in takes}
        if "training" in takes:
            kwargs["training"] = self.context.training
        with keras_private.within_call(layer, self.context.training):
            losses = len(layer.losses)
            with keras_private.weights_cast_to(dtype), warnings.catch_warnings():
                # Keras says so when the model itself runs.
                warnings.filterwarnings("ignore", ".*does not support masking")
                outputs = layer.call(*args, **kwargs)
        leaves = tree.flatten(outputs)
        if not leaves or not all(isinstance(leaf, keras.KerasTensor) for leaf in leaves):
            raise NotImplementedError("its `call` returns something else than tensors")
        if len(layer.losses) != losses:
            keras_private.clear_losses(layer)
            raise NotImplementedError("its `call` adds a loss")
        return masks.left_on(outputs)

    def _run_opened(self, graph, weights, layer, args, kwargs, name: str):
        dtype = _input_dtype(layer)
        values = masks.values_among(args, kwargs)
        outer = self._weight_dtype, self._opened
        self._weight_dtype, self._opened = dtype, layer
        try:
            scope = self._scope_within(layer, name)
            inputs = [*(self._cast(value, dtype, scope) for value in values), *map(self._weight, weights)]
            outputs, left = self._walk(graph, inputs, scope, opened=True)
        finally:
            self._weight_dtype, self._opened = outer
        outputs = tree.map_structure(lambda y, mask: y.with_mask(y.mask if mask is y else mask), outputs, left)
        _record_activity_loss(layer, outputs)
        return outputs

    def _scope_within(self, layer, name: str) -> Scope:
        """The scope of a layer that is opened up. The layers in it get their names once."""
        scope = Scope() if layer is self.root else Scope(name, self._names.get(id(layer), name))
        if isinstance(layer, keras.Layer) and id(layer) not in self._walked:
            for known, attributes, inner in walk(layer, scope.path, self._attribute_path(scope.path)):
                if find_rule(inner) is None:
                    self._walked.add(id(inner))
                if self._names.setdefault(id(inner), known) == known != attributes:
                    self._attributes[known] = attributes
        return scope

    def _attribute_path(self, name: str) -> str:
        """How attributes reach what has a name."""
        named = [known for known in self._attributes if name.startswith(known) and name[len(known) :][:1] in "./:"]
        longest = max(named, key=len, default="")
        return self._attributes.get(longest, "") + name[len(longest) :]

    def _cast(self, value: Value, dtype, scope: Scope) -> Value:
        """The value in the dtype in which a layer sees its input (mixed precision)."""
        primal = _autocast(value, dtype)
        if primal is value.primal or primal.dtype == value.primal.dtype:
            return value
        name = self._unique(join(scope.name, "/", "cast"))
        cast = self._record(name, ops.cast, [replace(value, primal=primal)], primal, identity())
        return cast.with_mask(value.mask)

    def _run_by_autodiff(self, operation, args, kwargs, name: str, error: Exception):
        masked = any(value.mask is not None for value in masks.values_among(args))
        if masked and _layers_in(operation) and not any("mask" in key for key in kwargs):
            raise NotImplementedError(
                f"`{name}` is left to autodiff, and the layers in it would not see the mask of its input. Let its "
                "`call` take `mask` and pass it on, or multiply by the mask before the layer."
            )
        args, kwargs = self._as_values(operation, args, kwargs)
        values, args, kwargs = self._primals(operation, args, kwargs)
        if isinstance(operation, keras.Layer) and "training" in call_signature(operation).parameters:
            kwargs["training"] = self.context.training
        primal, pushforward = fall_back(operation, args, kwargs, [value.primal for value in values])
        if pushforward is not None:
            if self.fallback == "error":
                raise missing_rule_error(operation, name, _reason(error)) from error
            expected = isinstance(error, Declined) and error.to_autodiff
            self.fallbacks[name] = LeftToAutodiff(type(operation).__name__, _reason(error), expected)
        return self._record(name, operation, values, primal, pushforward)

    def _primals(self, operation, args, kwargs):
        """The `Value`s among the arguments as the operation sees them, and the arguments with their primals."""
        dtype = _input_dtype(operation)
        values: list[Value] = []

        def primal(leaf):
            if not isinstance(leaf, Value):
                return leaf
            values.append(leaf if dtype is None else replace(leaf, primal=_autocast(leaf, dtype)))
            return values[-1].primal

        return values, *_map_arguments(primal, args, kwargs)

    def _with_masks(self, operation, args, kwargs, outputs):
        """The outputs with the masks that Keras leaves on them."""
        if not isinstance(operation, keras.Layer):
            # A tensor that is passed on as it is keeps what Keras wrote on it.
            kept = {id(value.primal): value.mask for value in masks.values_among(args, kwargs)}
            return map_leaves(lambda y: y.with_mask(y.mask or kept.get(id(y.primal))), outputs)
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
        """The weights and constants among an operation's inputs as values too; no tangent ever reaches a constant."""

        def convert(leaf):
            if isinstance(leaf, Value):
                return leaf
            if isinstance(leaf, keras.Variable):
                return self._weight(leaf)
            layer = isinstance(operation, keras.Layer)
            # What NumPy has of no more than Python's precision is a number (`np.float64`), the rest is as a tensor.
            if isinstance(leaf, (np.ndarray, np.generic)) and not isinstance(leaf, float) and not layer:
                leaf = ops.convert_to_tensor(leaf)
            if not ops.is_tensor(leaf) or (layer and not len(leaf.shape)):
                return leaf
            batched = [value.primal for value in masks.values_among(args, kwargs) if value.batched]
            if not layer or not batched:
                return self.value(leaf, batched=False)
            # For a layer one row stands for the batch: tangents of different batch sizes could not be folded alike.
            row = leaf.shape[0] == 1
            return self.value(ops.broadcast_to(leaf, (ops.shape(batched[0])[0], *leaf.shape[1:])) if row else leaf)

        return _map_arguments(convert, args, kwargs)

    def _weight(self, variable) -> Value:
        """The value of a weight that an operation takes as an input: the same one at each use in one dtype."""
        with keras_private.weights_cast_to(self._weight_dtype):
            primal = ops.convert_to_tensor(variable.value)
        for known, value in self.variables:
            if known is variable and value.primal.dtype == primal.dtype:
                return value
        value = self.value(primal, batched=False)
        self.variables.append((variable, value))
        if self.companions is not None:
            self.companions.enter_weight(variable, value)
        return value

    def _run_activation(self, activation, value: Value, name: str) -> Value:
        return self._run_named(activation, (value,), {}, name)

    def _record(self, name, operation, inputs: Sequence[Value], primal, pushforward, image=None):
        batched = any(value.batched for value in inputs)
        outputs = map_leaves(lambda leaf: self.value(leaf, batched), primal)
        examples = pushforward.examples if pushforward is not None and callable(pushforward.examples) else None
        if pushforward is not None and not any(value.has_tangents for value in leaves_of(outputs)):
            pushforward = None
        layer = operation if isinstance(operation, keras.Layer) else self._opened
        path = self._attribute_path(name)
        ends = tuple(inputs), tuple(leaves_of(outputs))
        node = Node(name, operation, *ends, pushforward, layer, examples, path)
        self.nodes.append(node)
        if self.companions is not None:
            self.companions.push(node, image)
        return outputs

    def _unique(self, name: str) -> str:
        uses = self._uses.get(name, 0)
        self._uses[name] = uses + 1
        return f"{name}:{uses}" if uses else name


CONTROL_FLOW = (
    core.AssociativeScan,
    core.Cond,
    core.ForiLoop,
    core.Map,
    core.Scan,
    core.Switch,
    core.VectorizedMap,
    core.WhileLoop,
)


def _check_operations(graph: keras.Function) -> None:
    """Raises where a call that was traced cannot be run operation by operation.

    A trace that succeeds proves nothing: Keras only asks operations for the shapes of their outputs.
    """
    for operation in graph.operations:
        if isinstance(operation, CONTROL_FLOW):
            # What its functions close over, the symbols of the trace among it, is in no argument.
            raise NotImplementedError(f"its `call` has control flow (`keras.ops.{_kind(operation)}`)")
        args, kwargs = keras_private.last_call(operation)
        if isinstance(operation, numpy_ops.GetItem) and any(map(_has_symbol, tree.flatten((args, kwargs)))):
            raise NotImplementedError("its `call` slices by a tensor")
        if not _is_bare(operation):
            continue
        if any(isinstance(leaf, keras.KerasTensor) for leaf in tree.flatten(list(vars(operation).values()))):
            # Of the trace: it is no input of the operation, which would compute with the symbol itself.
            raise NotImplementedError(f"its `call` gives `{_kind(operation)}` a tensor in place of a constant")
        if find_rule(operation) is None:
            # Not by what the operation knows of its own shapes: by its `call`, as it will run.
            keras.Operation.compute_output_spec(operation, *args, **kwargs)


def _has_symbol(leaf) -> bool:
    bounds = (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else ()
    return any(isinstance(bound, keras.KerasTensor) for bound in bounds)


def _reason(error: Exception) -> str:
    """Why an operation is left to autodiff, in one line: what the engine says, or where its `call` failed."""
    if isinstance(error, (NotImplementedError, Declined)) and str(error):
        return str(error).splitlines()[0]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(part in LIBRARIES for part in Path(frame.filename).parts)]
    named = [frame for frame in own if not Path(frame.filename).name.startswith("__autograph")]
    where = f", line {named[-1].lineno} of {Path(named[-1].filename).name}" if named else ""
    said = re.split(r"\n|(?<=\w)\.(?= |$)", str(error).strip())[0]
    return f"its `call` does not take symbols for tensors ({type(error).__name__}{said and f': {said}'}{where})"


LIBRARIES = {"site-packages", Path(__file__).parent.name}
"""Folders whose files are not the user's."""


def _symbol(tensor) -> keras.KerasTensor:
    return keras.KerasTensor(tuple(tensor.shape), dtype=keras.backend.standardize_dtype(tensor.dtype))


@contextlib.contextmanager
def _forgotten(operation):
    """A context after which the layers within an operation know nothing of the symbols that they were called with.

    Keras keeps each call with symbols on the layer, and with it all that came before: after a thousand steps, a
    thousand graphs with the tensors that are constants in them.
    """
    held = [value for value in _attributes(operation).values() if isinstance(value, keras.Operation)]
    calls = [nodes for one in (*_layers_in(operation), *held) for nodes in keras_private.recorded_calls(one)]
    counts = [len(nodes) for nodes in calls]
    try:
        yield
    finally:
        for nodes, count in zip(calls, counts, strict=True):
            del nodes[count:]


@contextlib.contextmanager
def _seeds_put_back(layer):
    """A context in which a layer may draw random numbers, of which it has drawn none if it fails.

    It gives a function that takes back what was drawn so far, for another try.
    """
    weights = {id(variable) for variable in layer.weights} if isinstance(layer, keras.Layer) else set()
    known = layer.variables if isinstance(layer, keras.Layer) else []
    seeds = [variable for variable in known if id(variable) not in weights]
    before = [ops.convert_to_tensor(variable) + 0 for variable in seeds]

    def put_back():
        for variable, value in zip(seeds, before, strict=True):
            variable.assign(value)

    try:
        yield put_back
    except Exception:
        put_back()
        raise


@contextlib.contextmanager
def _symbols_for_weights(layer, owned: dict[str, Any], dtype):
    """A context in which a layer's attributes hold symbols in place of the weights that it owns."""
    with keras_private.weights_cast_to(dtype):
        symbols = {key: _symbol(ops.convert_to_tensor(variable.value)) for key, variable in owned.items()}
    try:
        # Past the layer's own `__setattr__`, which would track them.
        _attributes(layer).update(symbols)
        yield list(symbols.values())
    finally:
        _attributes(layer).update(owned)


def _layers_in(operation) -> list[keras.Layer]:
    """The layers that an operation holds, if it is a layer, and those in them."""
    return keras_private.layers_within(operation, itself=False) if isinstance(operation, keras.Layer) else []


def _attributes(layer) -> dict[str, Any]:
    return vars(layer) if isinstance(layer, keras.Layer) else {}


def _is_bare(operation) -> bool:
    """Whether it is an operation of `keras.ops`, with nothing in it to open up."""
    return isinstance(operation, keras.Operation) and not isinstance(operation, keras.Layer)


def freeze(operation, *inputs, context: Context) -> tuple:
    """An operation's outputs, and the operation frozen at `inputs` as one pushforward."""
    return Tracer(context)._run_inner((), operation, *inputs)


def trace(
    model,
    x,
    inputs: Sequence,
    context: Context,
    companions: Companions | None = None,
    fallback: str = "allow",
) -> tuple[Tracer, list[Value], Any]:
    """Runs `model` once on the flat list of `inputs` `(B, …)`, which the user gave as the structure `x`.

    Returns:
        The tracer with its nodes, the values of the inputs, and the output values in the model's own structure.
    """
    batch = ops.shape(inputs[0])[0] if len(inputs[0].shape) else None
    tracer = Tracer(replace(context, batch=batch), companions, model, fallback)
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
    for value in tree.flatten(outputs):
        if value.mask is not None:
            # A loss weighs by it.
            keras_private.set_mask(value.primal, value.mask.primal)
    return tracer, values, outputs


def _checked_pair(returned, name: str, operation) -> tuple:
    """What a rule returned, which must be an output with its pushforward, or with None if no tangent passes."""
    pair = isinstance(returned, tuple) and len(returned) == 2
    if not pair or not (returned[1] is None or isinstance(returned[1], Pushforward)):
        received = (
            [type(part).__name__ for part in returned] if isinstance(returned, tuple) else type(returned).__name__
        )
        raise TypeError(
            f"The rule of `{name}` ({type(operation).__name__}) returned something else than it must. Expected "
            f"(y, Pushforward), (y, None) or an Affine. Received: {received}"
        )
    return returned


@functools.cache
def _parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def _map_arguments(function, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Arguments with `function` of each leaf, which sees them in their order: that of a dict's keys is another one."""
    positional = tuple(map_leaves(function, argument) for argument in args)
    return positional, {name: map_leaves(function, argument) for name, argument in kwargs.items()}


def _as_taken(operation, args: tuple, kwargs: dict, taken: list[str]) -> tuple[tuple, dict]:
    """The arguments in the order of a rule's parameters, from the second on by the names that the call has for them."""
    if isinstance(operation, keras.Layer):
        names = list(call_signature(operation).parameters)[1 : len(args)]
        named = {name: value for name, value in zip(names, args[1:], strict=False) if name in taken}
        args = (*args[:1], *(value for name, value in zip(names, args[1:], strict=False) if name not in taken))
        kwargs = named | kwargs
    order = [name for name in taken if name in kwargs]
    return args, {name: kwargs[name] for name in [*order, *(name for name in kwargs if name not in order)]}


def _kind(operation) -> str:
    """The name of an operation's class, as Keras would write it: `reduce_max` of a `ReduceMax`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(operation).__name__).lower()


def _name(operation) -> str:
    return getattr(operation, "name", None) or operation.__name__


def _input_dtype(operation) -> str | None:
    """The dtype to which a layer casts its inputs (mixed precision), or None."""
    casts = isinstance(operation, keras.Layer) and operation.autocast
    return operation.compute_dtype if casts else None


def _autocast(value: Value, dtype):
    own = keras.backend.standardize_dtype(value.primal.dtype)
    kept = dtype in (None, own) or not keras.backend.is_float_dtype(own)
    return value.primal if kept else ops.cast(value.primal, dtype)


def _computed_in(operation, leaf):
    """An argument as a layer of Keras' computes with it: whole numbers as floats, unless it returns whole numbers."""
    whole = isinstance(leaf, Value) and not leaf.has_tangents
    if not whole or not isinstance(operation, keras.Layer) or type(operation).__module__.split(".")[0] != "keras":
        return leaf
    symbol = _symbol(leaf.primal)
    try:
        computed = operation.compute_output_spec(symbol)
    except Exception:  # Of several inputs: merged, whole numbers stay whole, or meet floats.
        return leaf
    floats = has_tangents(leaves_of(computed)[0])
    return replace(leaf, primal=ops.cast(leaf.primal, operation.compute_dtype)) if floats else leaf


def _record_activity_loss(operation, outputs) -> None:
    """What `Layer.__call__` does with an activity regularizer: its loss a batch, divided by the batch's size."""
    regularizer = getattr(operation, "activity_regularizer", None)
    if regularizer is not None:
        primal = leaves_of(outputs)[0].primal
        loss = regularizer(primal)
        operation.add_loss(loss / ops.cast(ops.shape(primal)[0], loss.dtype))
