"""What a layer's `call` was as a graph, remembered: the call itself runs again, on the same symbols.

A `call` is Python and may read anything: attributes that a user changes, random numbers, another module. So no list of
what it reads decides whether a graph still holds. The call runs anew at each opening, on the symbols that are
remembered, and each operation and each layer that it calls must be the next one that is remembered, with the same
arguments. What it saves is all that is slow: Keras' inference of shapes, which runs each operation, and the graph.

Remembered is only what holds no tensor, except attributes of the layer: constants, draws and losses are those of the
call that has just run. It is kept on the layer itself, so it is freed with it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import keras
import numpy as np
from keras import ops, tree

from jvpreg.common import keras_private
from jvpreg.common.eager import leaves_of, runs_eagerly
from jvpreg.engine.control_flow import Recorder
from jvpreg.engine.masks import values_among
from jvpreg.engine.node import Value
from jvpreg.engine.steps import PLAIN, TRACES, Step, attributes_of, copied, leaves_in, same
from jvpreg.engine.symbols import is_symbol
from jvpreg.rules.control_flow import ControlFlow

AT_MOST = 8
"""How many traces of a layer are remembered, of different shapes and modes: the last ones."""


class Trace(NamedTuple):
    """A call with symbols.

    Attributes:
        opened: the graph, without the tensors that are its constants.
        symbols: the arguments and the keyword arguments of the call.
        weights: symbols by the names of the attributes that held them in place of weights.
        losses: the losses that the call added.
        constants: the symbols that stood for tensors.
        steps: what it called.
        seeds: the states of the random numbers that it may draw.
        layers: the layers that it may call, and what is known of each.
    """

    opened: Any
    symbols: tuple
    weights: dict[str, Any]
    losses: list
    constants: list
    steps: list
    seeds: list
    layers: list[tuple]

    def fits(self, layer: keras.Layer, owned: dict[str, Any], dtype) -> bool:
        """Whether the layers in a layer, and its weights, are still those with which it was called."""
        if owned.keys() != self.weights.keys():
            return False
        with keras_private.weights_cast_to(dtype):
            pairs = [(owned[key].value, symbol) for key, symbol in self.weights.items()]
        now = [(one, facts_of(one)) for one in layers_called(layer, self.steps)]
        return all(_alike(tensor, symbol) for tensor, symbol in pairs) and same(now, self.layers)


class Traces:
    """The traces of a layer by what they depend on beside its own Python. A copy of the layer has none at first."""

    def __init__(self):
        self.by_key: dict[tuple, Trace] = {}

    def __reduce__(self):
        return Traces, ()

    def get(self, key: tuple) -> Trace | None:
        """The trace for a key, or None."""
        return self.by_key.get(key)

    def put(self, key: tuple, trace: Trace | None) -> None:
        """Remembers a trace as the newest one, and forgets the oldest ones; None: forgets that for the key."""
        self.by_key.pop(key, None)
        if trace is not None:
            for oldest in list(self.by_key)[: max(0, len(self.by_key) + 1 - AT_MOST)]:
                self.by_key.pop(oldest, None)
            self.by_key[key] = trace


def traces_of(layer: keras.Layer) -> Traces:
    """The traces of a layer, which it holds itself."""
    return vars(layer).setdefault(TRACES, Traces())  # Not by its own `__setattr__`, which would track them.


class Replay(Recorder):
    """What is called with symbols in a context, as far as it is what was called before: see `Recorder`."""

    def __init__(self, trace: Trace):
        super().__init__(lambda graph: self._changed())
        self._trace = trace
        self._remaining, self._places = iter(trace.steps), iter(trace.constants)
        self._has_changed = False

    def _changed(self) -> NoReturn:
        self._has_changed = True  # The call may catch the exception.
        raise NotImplementedError("its `call` has changed")

    def _called(self, operation, args: tuple, kwargs: dict, call: Callable):
        step = next(self._remaining, None)
        if step is None or not step.is_of(operation, args, kwargs):
            self._changed()
        return step.outputs

    def constant(self, leaf):
        """A leaf, or the symbol that stood for a tensor."""
        if not ops.is_tensor(leaf):
            return leaf
        place = next(self._places, None)
        if place is None or not _alike(leaf, place):
            self._changed()
        self.symbols.append(place)
        self.tensors.append(leaf)
        return place

    def ends(self, outputs, losses: list) -> bool:
        """Whether the whole call was that of the trace, by what it returned and the losses that it added."""
        found = tree.pack_sequence_as(outputs, list(map(self.constant, tree.flatten(outputs))))
        added = list(map(self.constant, losses))
        alike = same(copied(found), copied(self._trace.opened.outputs)) and same(added, self._trace.losses)
        return alike and not self._has_changed and next(self._remaining, None) is next(self._places, None) is None


def key_of(args: tuple, kwargs: dict, *facts: Any) -> tuple | None:
    """What the symbols for arguments depend on, and the facts; None if the call is not to be remembered."""
    values = values_among(args, kwargs)
    if not values or any(is_symbol(value.primal) or not runs_eagerly(value.primal) for value in values):
        return None
    leaves = [leaf for leaf in leaves_of([args, kwargs]) if not isinstance(leaf, Value)]
    if not all(isinstance(leaf, PLAIN) for leaf in leaves):
        return None
    # In checks of rules float64 is kept, and so it is in what symbols say of dtypes.
    promotion = keras.config.floatx(), keras.backend.result_type("float64", "float64")
    return _described((args, kwargs), {}), promotion, *facts


def _described(leaf, places: dict[int, int]):
    """What symbols depend on of a leaf or a structure; equal masks have equal `places`."""
    if isinstance(leaf, Value):
        mask = leaf.mask
        known = None if mask is None else (places.setdefault(mask.slot, len(places)), _kind(mask.primal))
        return Value, _kind(leaf.primal), known
    if isinstance(leaf, (list, tuple)):
        return type(leaf), tuple(_described(part, places) for part in leaf)
    if isinstance(leaf, dict):
        return type(leaf), tuple((key, _described(value, places)) for key, value in leaf.items())
    return type(leaf), leaf


def _kind(tensor) -> tuple:
    return tuple(tensor.shape), keras.backend.standardize_dtype(tensor.dtype)


def _alike(tensor, symbol) -> bool:
    """Whether a symbol may stand for a tensor."""
    return _kind(tensor) == (tuple(symbol.shape), symbol.dtype)


def can_be_remembered(layer: keras.Layer, trace: Trace) -> bool:
    """Whether a trace holds nothing that belongs to one call alone: no tensor but attributes of the layer."""
    held = {id(value) for value in vars(layer).values()}

    def stays(leaf) -> bool:
        of_call = isinstance(leaf, np.ndarray) or ops.is_tensor(leaf)
        return not of_call or (id(leaf) in held and runs_eagerly(leaf))

    kept = [leaf for step in trace.steps for part in step[1:] for leaf in leaves_in(part)]
    return (
        not any(isinstance(operation, ControlFlow) for operation in trace.opened.graph.operations)
        and not any(map(is_symbol, vars(layer).values()))  # A call that leaves symbols on the layer may read them.
        and all(map(stays, kept))
    )


def layers_called(layer, steps: Sequence[Step]) -> list[keras.Layer]:
    """The layers in a layer, and those that its call takes from elsewhere, with the layers in them."""
    within = keras_private.layers_within(layer, itself=False) if isinstance(layer, keras.Layer) else ()
    found = {id(one): one for one in within}
    for step in steps:
        if isinstance(step.operation, keras.Layer) and id(step.operation) not in found:
            found |= {id(one): one for one in keras_private.layers_within(step.operation)}
    return list(found.values())


def facts_of(layer: keras.Layer) -> tuple:
    """What a layer may read when it says which outputs and masks it returns."""
    return type(layer).call, layer.dtype_policy, layer.supports_masking, attributes_of(layer)
