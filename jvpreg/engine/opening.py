"""A layer's `call` as a graph of smaller operations, by a call with symbols for its tensors."""

import contextlib
import re
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
from keras import ops, tree

from jvpreg.common import keras_private
from jvpreg.common.dtypes import has_tangents
from jvpreg.common.eager import map_leaves
from jvpreg.common.keras_private import core, numpy_ops
from jvpreg.engine import masks
from jvpreg.engine.arguments import autocast, input_dtype, kind_of, symbol_of
from jvpreg.engine.control_flow import CONTROL_FLOW, Recorder
from jvpreg.engine.inputs import call_signature
from jvpreg.engine.node import Value
from jvpreg.engine.remembering import Replay, Trace, can_be_remembered, facts_of, key_of, layers_called, traces_of
from jvpreg.engine.symbols import losses_in
from jvpreg.rules.contract import Declined
from jvpreg.rules.registry import find_rule, unwrap


class Opened(NamedTuple):
    """A `call` as a graph.

    Attributes:
        graph: from tensors, then the layer's own weights, and then constants, to the tensors that the call returns, the
            masks that it left on them, and the losses that it added.
        weights: the weights among its inputs.
        constants: the tensors that are its last inputs.
        kept: by the `id` of a layer in it that returns something else than tensors too, which leaves are tensors.
        outputs: what the call returned: a structure of symbols, and of whatever else it returned.
    """

    graph: keras.Function
    weights: list
    constants: list
    kept: dict[int, list[bool]]
    outputs: Any

    def filled(self, values: Sequence) -> Any:
        """What the call returns, with values in place of its symbols."""
        rest = iter(values)
        leaves = tree.flatten(self.outputs)
        filled = [next(rest) if isinstance(leaf, keras.KerasTensor) else leaf for leaf in leaves]
        return tree.pack_sequence_as(self.outputs, filled)


def open_up(layer, args: tuple, kwargs: dict, training: bool) -> Opened:
    """A layer's `call`, or a function, as a graph of smaller operations: by a call with symbols for its tensors.

    Args:
        layer: the layer or function.
        args: its arguments, with a `Value` for each tensor.
        kwargs: its keyword arguments.
        training: the mode in which the layers in it run.

    Raises:
        Exception: whatever a call raises when it is given symbols for tensors.
    """
    if is_bare(layer) and not isinstance(layer, CONTROL_FLOW):
        raise NotImplementedError("the operation has no rule")
    dtype = input_dtype(layer)
    key = key_of(args, kwargs, training, dtype) if isinstance(layer, keras.Layer) else None
    if key is None:
        return _open_up(layer, args, kwargs, dtype, training)[0]
    traces = traces_of(layer)
    known = traces.get(key)
    opened = None if known is None else _called_again(layer, known, dtype, training)
    if opened is None:
        opened, trace = _open_up(layer, args, kwargs, dtype, training)
        traces.put(key, trace if can_be_remembered(layer, trace) else None)
    return opened


def _open_up(layer, args: tuple, kwargs: dict, dtype, training: bool) -> tuple[Opened, Trace]:
    """A call as a graph, and what can be remembered of it."""

    def symbol(value):
        return symbol_of(autocast(value, dtype))

    # Its own weights get symbols too, so that the graph holds what is computed from them.
    owned = _own_weights(layer)
    with _seeds_put_back(_seeds_of(layer)) as put_back:
        try:
            symbols, inputs = masks.symbols(args, kwargs, symbol)
            weights = _weights_as_symbols(owned, dtype)
            with _in_place_of_weights(layer, weights, owned):
                inputs += weights.values()
                graph, recorder, outputs, losses = _traced(layer, symbols, inputs, dtype, training, True)
        except Exception:
            # The call reads `weight.value`, or assigns to it: the weights stay constants.
            put_back()
            owned = weights = {}
            symbols, inputs = masks.symbols(args, kwargs, symbol)
            graph, recorder, outputs, losses = _traced(layer, symbols, inputs, dtype, training)
        check_operations(graph)
    kept = {key: leaves for key, leaves in recorder.kept.items() if leaves is not None}
    opened = Opened(graph, list(owned.values()), recorder.tensors, kept, outputs)
    called = [(one, facts_of(one)) for one in layers_called(layer, recorder.steps)]
    remembered = opened._replace(constants=[])
    seeds = _seeds_of(layer)
    return opened, Trace(remembered, symbols, weights, losses, recorder.symbols, recorder.steps, seeds, called)


def _called_again(layer, trace: Trace, dtype, training: bool) -> Opened | None:
    """The same call on the same symbols once more, as a graph; None if it does anything else than it did."""
    owned = _own_weights(layer) if trace.weights else {}
    if not trace.fits(layer, owned, dtype):
        return None
    replay = Replay(trace)
    losses: list = []
    with _seeds_put_back(trace.seeds) as put_back:
        try:
            with (
                _in_place_of_weights(layer, trace.weights, owned),
                replay.recording(),
                losses_in(layer, losses),
            ):
                unchanged = replay.ends(_call(layer, trace.symbols, dtype, training), losses)
        except Exception:  # What it raises now it raises again when it is traced.
            unchanged = False
        if not unchanged:
            put_back()
    return trace.opened._replace(weights=list(owned.values()), constants=replay.tensors) if unchanged else None


def _traced(layer, symbols, inputs: list, dtype, training: bool, weights_are_symbols: bool = False) -> tuple:
    """The graph of a call with symbols, what was recorded, what the call returned, and the losses that it added."""
    losses: list = []
    recorder = Recorder(check_operations)
    with recorder.recording(), losses_in(layer, losses):
        outputs = _call(layer, symbols, dtype, training)
    # If weights are symbols too, what is no symbol is a constant, such as angles that need a shape alone.
    constant = ops.is_tensor if weights_are_symbols else lambda leaf: False
    if not any(isinstance(leaf, keras.KerasTensor) or constant(leaf) for leaf in tree.flatten(outputs)):
        raise NotImplementedError("its `call` returns nothing that follows from its arguments")
    outputs = tree.pack_sequence_as(outputs, list(map(recorder.constant, tree.flatten(outputs))))
    leaves = [leaf for leaf in tree.flatten(outputs) if isinstance(leaf, keras.KerasTensor)]
    losses = list(map(recorder.constant, losses))
    graph = keras_private.function([*inputs, *recorder.symbols], [leaves, masks.left_on(leaves), losses])
    return graph, recorder, outputs, losses


def _call(layer, symbols, dtype, training: bool):
    """What a layer's own `call` returns of symbols."""
    args, kwargs = symbols
    if not isinstance(layer, keras.Layer):
        return layer(*args, **kwargs)
    # Keras passes these itself, whether a call takes them or not.
    takes = call_signature(layer).parameters
    kwargs = {key: value for key, value in kwargs.items() if key not in ("training", "mask") or key in takes}
    if "training" in takes:
        kwargs["training"] = training
    cast = keras_private.weights_cast_to(dtype)
    with keras_private.within_call(layer, training), cast, warnings.catch_warnings():
        # Keras warns of it when the model itself runs.
        warnings.filterwarnings("ignore", ".*does not support masking")
        return layer.call(*args, **kwargs)


def check_operations(graph: keras.Function) -> None:
    """Raises if a call that was traced cannot be run operation by operation.

    A trace that succeeds proves nothing: Keras only asks operations for the shapes of their outputs.
    """
    for operation in graph.operations:
        if isinstance(operation, CONTROL_FLOW):
            # Made outside of the trace. Its functions may close over symbols that are in no argument.
            raise NotImplementedError(f"its `call` has control flow (`keras.ops.{kind_of(operation)}`)")
        args, kwargs = keras_private.last_call(operation)
        if isinstance(operation, numpy_ops.GetItem) and any(map(_has_symbol, tree.flatten((args, kwargs)))):
            raise NotImplementedError("its `call` slices by a tensor")
        if isinstance(operation, core.Slice) and _is_of_unknown_size(operation, args[0]):
            raise NotImplementedError("its `call` slices by a size that is not known")
        if not is_bare(operation):
            continue
        if any(isinstance(leaf, keras.KerasTensor) for leaf in tree.flatten(list(vars(operation).values()))):
            # A symbol of the trace that is no input: the operation would compute with the symbol itself.
            raise NotImplementedError(f"its `call` gives `{kind_of(operation)}` a tensor in place of a constant")
        if find_rule(operation) is None and unwrap(operation) is operation:
            # By its `call`, as it will run, and not by what the operation says of its shapes.
            keras.Operation.compute_output_spec(operation, *args, **kwargs)


def _has_symbol(leaf) -> bool:
    bounds = (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else ()
    return any(isinstance(bound, keras.KerasTensor) for bound in bounds)


def _is_of_unknown_size(operation, x) -> bool:
    """Whether a slice does not know how much it takes of an axis whose own size is known."""
    return any(size is None and whole is not None for size, whole in zip(operation.shape, x.shape, strict=True))


def reason_of(error: Exception) -> str:
    """Why an operation is left to autodiff, in one line: what the engine says, or where its `call` failed."""
    if isinstance(error, (NotImplementedError, Declined)) and str(error):
        return str(error).splitlines()[0]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(part in LIBRARIES for part in Path(frame.filename).parts)]
    named = [frame for frame in own if not Path(frame.filename).name.startswith("__autograph")]
    where = f", line {named[-1].lineno} of {Path(named[-1].filename).name}" if named else ""
    said = re.split(r"\n|(?<=\w)\.(?= |$)", str(error).strip())[0]
    return f"its `call` does not take symbols for tensors ({type(error).__name__}{said and f': {said}'}{where})"


LIBRARIES = {"site-packages", Path(__file__).parents[1].name}
"""Folders whose files are not the user's."""


@contextlib.contextmanager
def calls_forgotten(operation):
    """A context after which the layers within an operation have forgotten the calls with symbols.

    Keras records each such call on the layer, together with the graph before it: after a thousand steps there would
    be a thousand graphs, with the tensors that are constants in them.
    """
    held = [value for value in _attributes(operation).values() if isinstance(value, keras.Operation)]
    calls = [nodes for one in (*layers_in(operation), *held) for nodes in keras_private.recorded_calls(one)]
    counts = [len(nodes) for nodes in calls]
    try:
        yield
    finally:
        for nodes, count in zip(calls, counts, strict=True):
            del nodes[count:]


def _own_weights(layer) -> dict[str, Any]:
    """A layer's own weights by the attributes that hold them."""
    return {key: value for key, value in _attributes(layer).items() if isinstance(value, keras.Variable)}


def _seeds_of(layer) -> list:
    """The states of the random numbers that a layer may draw, and whatever else it has of variables but weights."""
    weights = {id(variable) for variable in layer.weights} if isinstance(layer, keras.Layer) else set()
    known = layer.variables if isinstance(layer, keras.Layer) else []
    return [variable for variable in known if id(variable) not in weights]


@contextlib.contextmanager
def _seeds_put_back(seeds: list):
    """A context in which a layer may draw random numbers. If it fails, the layer's seeds are put back.

    It gives a function that puts them back at once, for another try.
    """
    before = [ops.convert_to_tensor(variable) + 0 for variable in seeds]

    def put_back():
        for variable, value in zip(seeds, before, strict=True):
            variable.assign(value)

    try:
        yield put_back
    except Exception:
        put_back()
        raise


def _weights_as_symbols(owned: dict[str, Any], dtype) -> dict[str, Any]:
    """Symbols for weights, by the names of the attributes that hold them."""
    with keras_private.weights_cast_to(dtype):
        return {key: symbol_of(ops.convert_to_tensor(variable.value)) for key, variable in owned.items()}


@contextlib.contextmanager
def _in_place_of_weights(layer, symbols: dict[str, Any], owned: dict[str, Any]):
    """A context in which a layer's attributes hold symbols in place of the weights that it owns."""
    try:
        # Not by the layer's own `__setattr__`, which would track them.
        _attributes(layer).update(symbols)
        yield
    finally:
        _attributes(layer).update(owned)


def layers_in(operation) -> list[keras.Layer]:
    """The layers that an operation holds, if it is a layer, and those in them."""
    return keras_private.layers_within(operation, itself=False) if isinstance(operation, keras.Layer) else []


def _attributes(layer) -> dict[str, Any]:
    return vars(layer) if isinstance(layer, keras.Layer) else {}


def is_bare(operation) -> bool:
    """Whether it is an operation of `keras.ops`, with nothing in it to open up."""
    return isinstance(operation, keras.Operation) and not isinstance(operation, keras.Layer)


def is_constant(operation, args: tuple, kwargs: dict) -> bool:
    """Whether it is an operation of `keras.ops` on whole numbers alone: no tangent passes, so Keras' own call will do.

    What an operation is written out in may return another dtype of them, or compute in floats only.
    """
    if not is_bare(operation) or isinstance(operation, CONTROL_FLOW):
        return False
    floats = []

    def note(leaf):
        tensor = leaf.primal if isinstance(leaf, Value) else leaf
        if hasattr(tensor, "dtype") and has_tangents(tensor):
            floats.append(tensor)

    map_leaves(note, (args, kwargs))
    return not floats
