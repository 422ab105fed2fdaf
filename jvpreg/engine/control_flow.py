"""Loops and branches of a `call` while it is traced: as graphs of their own, or written out.

Keras itself only asks their functions for shapes, and the graph of a `call` has no edge for what a function closes
over. Here the function is called with symbols for its arguments. The symbols that it takes from outside are inputs of
the operation in its place (`jvpreg.rules.control_flow`), so tangents and gradients pass through them too.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from jvpreg.common import keras_private
from jvpreg.common.keras_private import core, numpy_ops
from jvpreg.common.replaced import replaced
from jvpreg.engine.arguments import kind_of, map_arguments, symbol_of
from jvpreg.engine.steps import Step
from jvpreg.engine.symbols import SHAPES, is_symbol, specified, symbols_in
from jvpreg.rules.control_flow import Body, Map, Scan, Switch, WhileLoop

WRITTEN_OUT = 16
"""Loops of at most this known number of steps are written out, step by step: their indices are then plain numbers, and
all rules apply. Each step costs the time of tracing it, and of compiling it in a graph."""

FUNCTIONS = ("associative_scan", "cond", "fori_loop", "map", "scan", "switch", "vectorized_map", "while_loop")
"""The control flow in `keras.ops`."""

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

ARRAYS: list = [(keras.KerasTensor, "__jax_array__", None)] if hasattr(keras.KerasTensor, "__jax_array__") else []
"""It raises: without it, an array of JAX leaves `array * symbol` to the symbol."""


class Recorder:
    """What is called with symbols in a context, with control flow in a form that can be frozen.

    Args:
        check: called with the graph of each body; raises if it cannot be run operation by operation.

    Attributes:
        symbols: those that stand for tensors.
        tensors: for which they stand.
        kept: see `Opened`.
        steps: what was called with symbols, without what that called.
    """

    def __init__(self, check: Callable):
        self._check = check
        # The inputs of what made a symbol, by the symbol's `id`; and all symbols, which keep their `id` that way.
        self._inputs: dict[int, list] = {}
        self._made: list = []
        # What layers return that is not all tensors, by the layer's `id`, until they return it.
        self._returned: dict[int, Any] = {}
        self.symbols: list = []
        self.tensors: list = []
        self.kept: dict[int, list[bool] | None] = {}
        self.steps: list[Step] = []
        self._depth = 0

    @contextlib.contextmanager
    def recording(self):
        """A context in which calls are recorded."""
        changes: list[tuple[Any, str, Callable | None]] = [
            (keras.Operation, "symbolic_call", self._call_operation),
            (keras.Layer, "__call__", self._call_layer),
            (keras.Layer, "symbolic_call", self._symbols_of_layer),
            (keras.KerasTensor, "__eq__", _equal),
            *((ops, name, functools.partial(self._call_function, name)) for name in FUNCTIONS),
            *SHAPES,
            *ARRAYS,
        ]
        with replaced(changes):
            yield

    def _call_operation(self, original: Callable, operation, *args, **kwargs):
        if isinstance(operation, CONTROL_FLOW):
            return self._control_flow(operation, *args, **kwargs)
        if isinstance(operation, numpy_ops.Ndim):  # A number, as of a tensor.
            return len(args[0].shape)
        outputs = self._called(operation, args, kwargs, lambda: original(operation, *args, **kwargs))
        self._record(outputs, symbols_in((args, kwargs)))
        return outputs

    def _called(self, operation, args: tuple, kwargs: dict, call: Callable):
        """What an operation or layer returns, which `call` calls."""
        self._depth += 1
        try:
            outputs = call()
        finally:
            self._depth -= 1
        if not self._depth:
            self.steps.append(Step.of(operation, args, kwargs, outputs))
        return outputs

    def _symbols_of_layer(self, _, layer, *args, **kwargs):
        outputs = specified(layer, args, kwargs)
        symbols, kept = symbols_in(outputs), list(map(is_symbol, tree.flatten(outputs)))
        # Calls that return tensors alone may return any number of them.
        places = None if all(kept) else kept
        if self.kept.setdefault(id(layer), places) != places:
            raise NotImplementedError(f"it calls `{layer.name}` twice, which returns None in different places")
        if all(kept):
            return outputs
        # Keras records outputs that are symbols only. The layer returns the others in `_call_layer`.
        self._returned[id(layer)] = outputs
        return symbols

    def _call_layer(self, original: Callable, layer, *args, **kwargs):
        given = symbols_in((args, kwargs))
        if not given and not keras_private.asks_for_shapes() and layer.trainable_variables:
            args, kwargs = map_arguments(self.constant, args, kwargs)
            given = symbols_in((args, kwargs))
        if not given:
            return original(layer, *args, **kwargs)

        def call():
            outputs = original(layer, *args, **kwargs)
            return self._returned.pop(id(layer), outputs)

        outputs = self._called(layer, args, kwargs, call)
        self._record(outputs, given)
        return outputs

    def constant(self, leaf):
        """A leaf, or a symbol in place of a tensor: if a layer takes that, tangents of the layer's weights pass."""
        if not ops.is_tensor(leaf):
            return leaf
        self.symbols.append(symbol_of(leaf))
        self.tensors.append(leaf)
        return self.symbols[-1]

    def _record(self, outputs, inputs: list) -> None:
        made = symbols_in(outputs)
        self._made += made
        self._inputs.update((id(symbol), inputs) for symbol in made)

    def _call_function(self, name: str, original: Callable, *args, **kwargs):
        """A function of control flow: it may be called with no symbol, and close over some all the same."""
        before = len(self._made)
        try:
            return original(*args, **kwargs)
        except Exception:
            if symbols_in((args, kwargs)) or len(self._made) == before:
                raise
            # No backend runs a loop on symbols.
            return getattr(self, f"_{name}")(*args, **kwargs)

    def _control_flow(self, operation, *args, **kwargs):
        """Keras' operation, of what it was made with and is called with."""
        if isinstance(operation, core.ForiLoop):
            return self._fori_loop(operation.lower, operation.upper, operation.body_fun, *args, **kwargs)
        if isinstance(operation, core.WhileLoop):
            return self._while_loop(operation.cond, operation.body, args[0], operation.maximum_iterations)
        if isinstance(operation, core.VectorizedMap):
            return self._vectorized_map(operation.function, *args, **kwargs)
        given = {name: getattr(operation, name) for name in ("length", "reverse", "axis") if hasattr(operation, name)}
        return getattr(self, f"_{kind_of(operation)}")(*args, **kwargs, **given)

    # ---------------------------------------------------------------- bodies

    def _body(self, function: Callable, arguments: Sequence) -> tuple:
        """A function of symbols like the arguments as a graph, what it closes over, and its outputs."""
        symbols = [symbol_of(argument) for argument in arguments]
        before = len(self._made)
        outputs = function(*symbols)
        inside = {id(symbol) for symbol in [*symbols, *self._made[before:]]}
        leaves = tree.flatten(outputs)
        constants = [ops.convert_to_tensor(leaf) for leaf in leaves if not is_symbol(leaf)]
        places = iter([symbol_of(constant) for constant in constants])
        ends = [leaf if is_symbol(leaf) else next(places) for leaf in leaves]
        stand_ins = [end for end, leaf in zip(ends, leaves, strict=True) if end is not leaf]
        closed_over = self._closed_over([leaf for leaf in leaves if is_symbol(leaf)], inside)
        graph = keras_private.function([*symbols, *closed_over, *stand_ins], ends)
        self._check(graph)
        return Body(graph, len(symbols)), [*closed_over, *constants], outputs

    def _closed_over(self, outputs: list, inside: set[int]) -> list:
        """The symbols from outside of a function that its outputs follow from."""
        found, known, waiting = [], set(), list(outputs)
        while waiting:
            symbol = waiting.pop()
            if id(symbol) in known:
                continue
            known.add(id(symbol))
            if id(symbol) in inside:
                waiting += self._inputs.get(id(symbol), [])
            else:
                found.append(symbol)
        return found

    # ---------------------------------------------------------------- loops

    def _scan(self, f, init, xs=None, length=None, reverse=False, unroll=1):
        known = [leaf.shape[0] for leaf in tree.flatten(xs) if leaf is not None]
        length = length if length is not None else known[0]
        if length is not None and length <= WRITTEN_OUT:
            return self._written_out(f, init, xs, int(length), reverse)
        first = [_tensor(leaf) for leaf in tree.flatten(init)]
        elements = [leaf for leaf in tree.flatten(xs) if leaf is not None]
        count = len(first)

        def body(*arguments):
            x = None if xs is None else tree.pack_sequence_as(xs, list(arguments[count:]))
            following, y = f(tree.pack_sequence_as(init, list(arguments[:count])), x)
            structure[0] = y
            return [*_as_carried(following, first), *(leaf for leaf in tree.flatten(y) if leaf is not None)]

        structure = [None]
        traced, closed_over, _ = self._body(body, [*first, *(x[0] for x in elements)])
        (y,) = structure
        elements = [ops.moveaxis(x, 0, 1) if len(x.shape) > 1 else x for x in elements]
        found = self._run(Scan(traced, count, length, reverse), first, elements, closed_over)
        steps = iter([ops.moveaxis(one, 1, 0) if len(one.shape) > 1 else one for one in found[count:]])
        ys = [None if leaf is None else next(steps) for leaf in tree.flatten(y)]
        return tree.pack_sequence_as(init, found[:count]), tree.pack_sequence_as(y, ys)

    def _run(self, operation, *groups: Sequence) -> list:
        """An operation with bodies on symbols, and on tensors among them."""
        return list(operation.symbolic_call(*(leaf for group in groups for leaf in group)))

    def _written_out(self, f, carried, xs, length: int, reverse: bool):
        order, ys = range(length), []
        for i in reversed(order) if reverse else order:
            x = None if xs is None else tree.map_structure(lambda leaf, i=i: leaf[i], xs)
            carried, y = f(carried, x)
            ys.append(y)
        if not ys:
            raise NotImplementedError("its `call` has a loop without steps")
        ys = ys[::-1] if reverse else ys
        return carried, tree.map_structure(lambda *rows: None if rows[0] is None else ops.stack(rows), *ys)

    def _fori_loop(self, lower, upper, body_fun, init_val):
        if not (_is_number(lower) and _is_number(upper)):
            start = ops.cast(lower, "int32")
            _, last = self._while_loop(
                lambda i, value: i < upper, lambda i, value: (i + 1, body_fun(i, value)), (start, init_val)
            )
            return last
        if upper - lower <= WRITTEN_OUT:
            for i in range(int(lower), int(upper)):
                init_val = body_fun(i, init_val)
            return init_val
        numbers = ops.arange(int(lower), int(upper), dtype="int32")
        return self._scan(lambda value, i: (body_fun(i, value), None), init_val, numbers)[0]

    def _while_loop(self, cond, body, loop_vars, maximum_iterations=None):
        several = isinstance(loop_vars, (tuple, list))
        carried = tuple(loop_vars) if several else (loop_vars,)
        first = [_tensor(leaf) for leaf in tree.flatten(carried)]

        def of_leaves(function):
            return lambda *leaves: function(*tree.pack_sequence_as(carried, list(leaves)))

        def following(*leaves):
            return _as_carried(of_leaves(body)(*leaves), first)

        traced, closed_over, _ = self._body(following, first)
        condition, of_condition, _ = self._body(of_leaves(cond), first)
        operation = WhileLoop(traced, condition, maximum_iterations)
        found = tree.pack_sequence_as(carried, self._run(operation, first, closed_over, of_condition))
        return found if several else found[0]

    def _map(self, f, xs, vectorized=False):
        elements = tree.flatten(xs)

        def body(*leaves):
            return f(tree.pack_sequence_as(xs, list(leaves)))

        traced, closed_over, outputs = self._body(body, [x[0] for x in elements])
        found = self._run(Map(traced, elements[0].shape[0], vectorized), elements, closed_over)
        return tree.pack_sequence_as(outputs, found)

    def _vectorized_map(self, function, elements):
        return self._map(function, elements, vectorized=True)

    def _associative_scan(self, f, elems, reverse=False, axis=0):
        """By the recursion that backends use: the results at odd places are a scan of half as many pairs."""
        flat = [ops.flip(leaf, axis) if reverse else leaf for leaf in tree.flatten(elems)]
        if flat[0].shape[axis] is None:
            raise NotImplementedError("its `call` has an `associative_scan` along an axis of unknown size")

        def combine(a, b):
            return tree.flatten(f(tree.pack_sequence_as(elems, a), tree.pack_sequence_as(elems, b)))

        def part(leaves, *bounds):
            key = [(slice(None),) * (axis % len(leaf.shape)) + (slice(*bounds),) for leaf in leaves]
            return [leaf[k] for leaf, k in zip(leaves, key, strict=True)]

        def scan(leaves):
            count = leaves[0].shape[axis]
            if count < 2:
                return leaves
            odd = scan(combine(part(leaves, 0, count - 1, 2), part(leaves, 1, None, 2)))
            even = part(leaves, 0, 1)
            if count > 2:
                known = part(odd, 0, -1) if count % 2 == 0 else odd
                later = combine(known, part(leaves, 2, None, 2))
                even = [ops.concatenate(pair, axis) for pair in zip(even, later, strict=True)]
            # Even places and then odd ones, in turn again.
            order = np.argsort([*range(0, count, 2), *range(1, count, 2)])
            return [ops.take(ops.concatenate(pair, axis), order, axis) for pair in zip(even, odd, strict=True)]

        found = [ops.flip(leaf, axis) if reverse else leaf for leaf in scan(flat)]
        return tree.pack_sequence_as(elems, found)

    # ---------------------------------------------------------------- branches

    def _cond(self, pred, true_fn, false_fn):
        if isinstance(pred, (bool, np.bool_, int)):
            return true_fn() if pred else false_fn()
        pred = ops.reshape(pred, ()) if len(pred.shape) else pred
        index = 1 - ops.cast(ops.cast(pred, "bool"), "int32")
        return self._switch(index, [true_fn, false_fn])

    def _switch(self, index, branches, *operands):
        if isinstance(index, (int, np.integer)):
            return branches[min(max(int(index), 0), len(branches) - 1)](*operands)
        given = [_tensor(leaf) for leaf in tree.flatten(operands)]

        def of_leaves(branch):
            return lambda *leaves: branch(*tree.pack_sequence_as(operands, list(leaves)))

        traced = [self._body(of_leaves(branch), given) for branch in branches]
        first, *others = ([(x.shape, x.dtype) for x in body.graph.outputs] for body, *_ in traced)
        if any(other != first for other in others):
            raise NotImplementedError("its `call` has branches that return tensors of different shapes or dtypes")
        operation = Switch(*(body for body, *_ in traced))
        found = self._run(operation, [_tensor(index)], given, *(closed_over for _, closed_over, _ in traced))
        return tree.pack_sequence_as(traced[0][2], found)


def _as_carried(outputs, first: Sequence) -> list:
    """What a step carries on, in the dtypes and shapes of what it got."""
    leaves = [_tensor(leaf) for leaf in tree.flatten(outputs)]
    if [tuple(leaf.shape) for leaf in leaves] != [tuple(x.shape) for x in first]:
        raise NotImplementedError("its `call` has a loop in which a shape changes from step to step")
    dtypes = [keras.backend.standardize_dtype(x.dtype) for x in first]
    return [cast_if(leaf, dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]


def cast_if(leaf, dtype: str):
    """A tensor or symbol in a dtype."""
    return leaf if keras.backend.standardize_dtype(leaf.dtype) == dtype else ops.cast(leaf, dtype)


def _tensor(leaf):
    return leaf if is_symbol(leaf) else ops.convert_to_tensor(leaf)


def _equal(_, symbol, other):
    """`symbol == other`, which tensors compare entry by entry. Keras says silently that no symbol equals anything."""
    comparable = (
        isinstance(other, (bool, int, float, np.ndarray, np.generic)) or is_symbol(other) or ops.is_tensor(other)
    )
    return ops.equal(symbol, other) if comparable else NotImplemented


def _is_number(bound) -> bool:
    return isinstance(bound, (int, np.integer))
