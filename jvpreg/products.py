"""`linearize`: runs a model once at `x` and freezes it there; and single products in one call."""

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict, Unpack

import keras
from keras import ops, tree

from jvpreg.common import checks
from jvpreg.common.compilers import traced_by_tensorflow, traced_for_xla
from jvpreg.common.dtypes import as_floats, has_tangents
from jvpreg.common.typing import Structure, WeightTangents
from jvpreg.engine.autodiff import LeftToAutodiff
from jvpreg.engine.companions import Companions
from jvpreg.engine.frozen_graph import FrozenGraph
from jvpreg.engine.inputs import check_moving, standardize_inputs
from jvpreg.engine.node import Node, moved_to
from jvpreg.engine.starts import check_path, possible_starts, started_at
from jvpreg.engine.tangents import (
    InputStructure,
    check_count,
    each_name,
    flatten_tangents,
    pack_products,
    standardize_tangents,
    weight_pairs,
    weight_tangents,
)
from jvpreg.engine.tracer import trace
from jvpreg.linearization import Linearization
from jvpreg.rules.contract import Context
from jvpreg.rules.registry import unwrap

BatchStatistics = Literal["moving", "frozen", "coupled"]
Fallback = Literal["warn", "ignore", "error"]


class Options(TypedDict, total=False):
    """The keyword arguments of `linearize`."""

    training: bool
    batch_statistics: BatchStatistics | None
    fallback: Fallback
    xla: bool | None


_warned_of_head: "weakref.WeakSet[Any]" = weakref.WeakSet()
_warned_of_fallback: "weakref.WeakSet[Any]" = weakref.WeakSet()


def linearize(
    model: keras.Layer,
    x: Structure,
    training: bool = False,
    batch_statistics: BatchStatistics | None = None,
    fallback: Fallback = "warn",
    xla: bool | None = None,
    at: str | None = None,
    order: int = 1,
) -> "Linearization":
    """Runs a model once at `x` and freezes it there: masks, argmaxes, slopes and statistics.

    Its weights are not copied: linearize again when they have changed.

    Args:
        model: a Keras model or layer, built. A subclassed one, or one without a rule, is opened up: its `call` is
            traced into smaller operations.
        x: the model's input, `(B, …)`, or a structure of inputs such as the model takes.
        training: whether dropout is active and moving averages are updated (once, by this call).
        batch_statistics: what batch normalization uses. `"moving"`: its moving averages (the default when not
            training). `"frozen"`: the statistics of this batch, constant for the tangents but not for the weights (the
            default in training). `"coupled"`: the statistics of this batch, moving with it: the true derivative of the
            batch map, in which one example's tangent depends on the other examples.
        fallback: what to do with an operation that has no rule and cannot be opened up. `"warn"`: leave that node to
            the backend's autodiff, and say so once; `"ignore"`: say nothing; `"error"`: raise.
        xla: whether XLA compiles the function in which this runs. By default it is found out, except that a function
            without XLA may be called in one with it: of TensorFlow's own kernels, the fastest in a graph, rules then
            use those that XLA compiles rightly, and all if it is False. No result changes.
        at: the path of a layer (`"path:0"` its first run of several): derivatives are by the one tensor that it
            returned, `(B, …)`, and tangents are like it. What bypasses the layer is held constant, masks too.
        order: 2 if second derivatives are wanted, by `.hvp(u, w)`, `.laplacian()` and `.hessian()`; they cost nothing
            until then.

    Returns:
        A `Linearization`: `.outputs`, `.jvp(u)`, `.vjp(v)`, `.intercepts`, `.fallbacks`.

    Raises:
        NotImplementedError: an operation has no rule and `fallback` is `"error"`; or no rule is possible.
        ValueError: an argument does not fit, or the outputs do not depend on the layer `at`.

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
    order = checks.count("order", order, most=2)
    return _linearized(model, x, _linearize_options(training, batch_statistics, fallback, xla), at, order=order)


def linearize_elsewhere(model: keras.Layer, x: Structure, points: Sequence, at: str | None = None) -> Linearization:
    """The model frozen at points other than `x`, in inference.

    Args:
        model: as `linearize` takes it.
        x: its input, for its structure, its integers and its masks.
        points: a flat list like `linearize(model, x, at=at).inputs`; in place of integers they count for nothing.
        at: the path of a layer: the model goes on from the point in place of what this layer returned.
    """
    return _linearized(model, x, _linearize_options(), at, points)


def _linearized(
    model: keras.Layer,
    x: Structure,
    options: tuple[Context, Fallback],
    at: str | None,
    points: Sequence | None = None,
    order: int = 1,
) -> Linearization:
    model = _checked_model(model)
    if at is not None:
        check_path(model, at)
    inputs, moved = standardize_inputs(model, x), None
    if points is not None and at is not None:
        moved = at, functools.partial(moved_to, primal=points[0])
    elif points is not None:
        inputs = [p if has_tangents(given) else given for p, given in zip(points, inputs, strict=True)]
    graph, outputs, fallbacks = _freeze(model, x, inputs, options, moved=moved, order=order)
    structure = InputStructure(model, x)
    linearization = Linearization(graph, as_floats(inputs), outputs, structure.flatten, fallbacks, structure.pack)
    linearization.order = order
    return linearization if at is None else started_at(linearization, at)


def jvp(
    model: keras.Layer, x: Structure, u: Structure, at: str | None = None, **kwargs: Unpack[Options]
) -> tuple[Structure, Structure]:
    """`f(x)` and `J u`. Shapes and keyword arguments as in `linearize` and `Linearization.jvp`.

    The tangents go through the model along with `x`: in one scan with a recurrent cell, and in the same call of a
    layer if all shapes are known and it has many weights, more than `x` and the tangents have entries.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> y, ju = jvpreg.jvp(model, np.zeros((1, 3)), np.ones((1, 3)))
    """
    if at is not None:
        linearization = linearize(model, x, at=at, **kwargs)
        return linearization.outputs, linearization.jvp(u)
    return jvp_with(model, x, u, _linearize_options(**kwargs))


def jvp_with(model: keras.Layer, x: Structure, u: Structure, options: tuple[Context, Fallback]) -> tuple:
    """As `jvp`, by what rules are told of the run, and what becomes of an operation without a rule."""
    model = _checked_model(model)
    inputs = standardize_inputs(model, x)
    flat = flatten_tangents(model, x, u)
    check_count(flat, inputs, "u", "x")
    check_moving(flat, inputs, "u", lambda: possible_starts(linearize(model, x, fallback="ignore")))
    tangents, probed = standardize_tangents(flat, as_floats(inputs), each_name("u", "x", len(inputs)))
    companions = Companions(tangents)
    graph, outputs, _ = _freeze(model, x, inputs, options, companions)
    return outputs, pack_products(companions.products(graph), outputs, probed)


def vjp(
    model: keras.Layer, x: Structure, v: Structure, at: str | None = None, **kwargs: Unpack[Options]
) -> tuple[Structure, Structure]:
    """`f(x)` and `Jᵀ v`. Shapes and keyword arguments as in `linearize` and `Linearization.vjp`.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> y, jtv = jvpreg.vjp(model, np.zeros((1, 3)), np.ones((1, 2)))

    By what an embedding returned:

    >>> model = keras.Sequential([keras.Input((6,), dtype="int32"), keras.layers.Embedding(50, 4, name="embedding"),
    ...     keras.layers.Flatten(), keras.layers.Dense(2)])
    >>> tuple(jvpreg.vjp(model, np.ones((5, 6), "int32"), np.ones((5, 2)), at="embedding")[1].shape)
    (5, 6, 4)
    """
    linearization = linearize(model, x, at=at, **kwargs)
    return linearization.outputs, linearization.vjp(v)


def weight_jvp(
    model: keras.Layer, x: Structure, weights: WeightTangents, **kwargs: Unpack[Options]
) -> tuple[Structure, Structure]:
    """`f(x)` and `d/dε f(x; W + ε U)`. Weights as in `Linearization.jvp`, keyword arguments as in `linearize`.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> kernel, bias = model.trainable_variables
    >>> y, moved = jvpreg.weight_jvp(model, np.ones((1, 3)), [(kernel, np.ones((3, 2))), (bias, np.ones(2))])
    >>> moved.tolist() if hasattr(moved, "tolist") else moved.numpy().tolist()
    [[4.0, 4.0]]
    """
    model = _checked_model(model)
    pairs = weight_pairs(weights)
    if not pairs:
        raise checks.invalid("weights", "a tangent of one weight at least", weights)
    known = getattr(model, "variables", [])
    if not known or not all(isinstance(key, str) or any(key is variable for variable in known) for key, _ in pairs):
        # The model does not track all weights: which ones it uses is known once it has run.
        linearization = linearize(model, x, **kwargs)
        return linearization.outputs, linearization.jvp(weights=pairs)
    given = weight_tangents(pairs, known)
    inputs = standardize_inputs(model, x)
    like = [ops.convert_to_tensor(variable) for variable, _ in given]
    names = [("weights", f"`{variable.path}`") for variable, _ in given]
    tangents, probed = standardize_tangents([tangent for _, tangent in given], like, names)
    variables = [variable for variable, _ in given]
    companions = Companions([None] * len(inputs), zip(variables, tangents, strict=True))
    graph, outputs, _ = _freeze(model, x, inputs, _linearize_options(**kwargs), companions)
    # Raises for a weight that the model tracks but does not differentiate by.
    weight_tangents([(variable, None) for variable in variables], graph.weights)
    return outputs, pack_products(companions.products(graph), outputs, probed)


def jacobian(
    model: keras.Layer, x: Structure, chunk_size: int = 64, at: str | None = None, **kwargs: Unpack[Options]
) -> Structure:
    """The whole Jacobian `(B, *output, *input)`. As `Linearization.jacobian`, keyword arguments as in `linearize`.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> tuple(jvpreg.jacobian(model, np.zeros((5, 3))).shape)
    (5, 2, 3)
    """
    return linearize(model, x, at=at, **kwargs).jacobian(chunk_size)


def hessian(
    model: keras.Layer, x: Structure, chunk_size: int = 64, at: str | None = None, **kwargs: Unpack[Options]
) -> Structure:
    """The whole second derivative `(B, *output, *input, *input)`, for models of few inputs.

    As `Linearization.hessian`, keyword arguments as in `linearize`.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activation="tanh")])
    >>> tuple(jvpreg.hessian(model, np.zeros((5, 3))).shape)
    (5, 2, 3, 3)
    """
    return linearize(model, x, at=at, order=2, **kwargs).hessian(chunk_size)


def _linearize_options(
    training: bool = False,
    batch_statistics: BatchStatistics | None = None,
    fallback: Fallback = "warn",
    xla: bool | None = None,
) -> tuple[Context, Fallback]:
    training = checks.boolean("training", training)
    checks.choice("batch_statistics", batch_statistics, ("moving", "frozen", "coupled", None))
    checks.choice("fallback", fallback, ("warn", "ignore", "error"))
    checks.boolean("xla", xla, optional=True)
    if batch_statistics is None:
        batch_statistics = "frozen" if training else "moving"
    if xla is None and traced_for_xla():
        xla = True
    return Context(training, batch_statistics, xla, traced_by_tensorflow()), fallback


def _freeze(
    model: keras.Layer,
    x: Structure,
    inputs: list,
    options: tuple[Context, Fallback],
    companions: Companions | None = None,
    moved: tuple[str, Callable] | None = None,
    order: int = 1,
) -> tuple[FrozenGraph, Any, dict[str, str]]:
    """The frozen graph, the outputs in the model's own structure, and what was left to autodiff, with the reasons."""
    along = companions if companions is not None and companions.go_along else None
    context, fallback = options
    tracer, values, outputs = trace(model, x, inputs, context, along, fallback=fallback, moved=moved, order=order)
    unexpected = {name: left for name, left in tracer.fallbacks.items() if not left.expected}
    if unexpected and fallback == "warn":
        _warn_of_fallback(model, unexpected)
    graph = tracer.frozen(values, tree.flatten(outputs))
    ends = {value.slot for value in graph.outputs}
    _warn_of_probabilities(model, [node for node in graph.nodes if any(v.slot in ends for v in node.outputs)])
    fallbacks = {name: str(left) for name, left in tracer.fallbacks.items()}
    return graph, tree.map_structure(lambda value: value.primal, outputs), fallbacks


def _checked_model(model: keras.Layer) -> keras.Layer:
    """The operation that a model really computes. Raises if the model is none, or is not built."""
    model = unwrap(model)
    if not isinstance(model, keras.Operation):
        raise checks.invalid("model", "a Keras model or layer", model)
    if not getattr(model, "built", True):
        raise ValueError(
            f"Invalid value for argument `model`. Expected a built model. Received: `{model.name}`, which has no "
            "weights yet. Call it on a batch, or give it a `keras.Input`, first."
        )
    return model


def _callers_level() -> int:
    """The stack level of the first caller outside of this package, for a warning of the calling function."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == __package__:
        frame, level = frame.f_back, level + 1
    return level


def _warn_of_fallback(model: keras.Layer, fallbacks: dict[str, LeftToAutodiff]) -> None:
    if model in _warned_of_fallback:
        return
    _warned_of_fallback.add(model)
    nodes = "\n".join(f"- `{name}` ({fallback.kind}): {fallback.reason}." for name, fallback in fallbacks.items())
    warnings.warn(
        f"Some nodes of `{model.name}` are left to the backend's autodiff, which runs them again for each probe and is "
        f"not always right under XLA:\n{nodes}\nFor a layer of your own, register a rule with "
        '`jvpreg.register_rule`; if this is as it should be, pass `fallback="ignore"` to `linearize`.',
        stacklevel=_callers_level(),
    )


def _warn_of_probabilities(model: keras.Layer, heads: Sequence[Node]) -> None:
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
                stacklevel=_callers_level(),
            )
            return
