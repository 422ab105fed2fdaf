"""Every private name of Keras that jvpreg uses, each behind a function or class with a plain name.

Keras has no public way to what is here. Nothing else in jvpreg imports `keras.src` or touches an underscore name of
Keras, so that a new version of Keras needs work in this file alone. `NAMES` and `ATTRIBUTES` say what each name is for,
and what to do here once Keras lacks it. A user is then told so in one sentence: at import if a module or class should
have the name, at the first use if only an instance has it.
"""

import contextlib
import functools
from typing import Any, NamedTuple

import keras

from jvpreg.common.replaced import replaced

TESTED = "3.15"
"""The newest version of Keras with which jvpreg is tested."""


class Use(NamedTuple):
    """What a name is for, and what to do once Keras lacks it.

    Attributes:
        purpose: as it stands after "which jvpreg needs to".
        otherwise: how to do the same without it: a hint for who mends this file.
    """

    purpose: str
    otherwise: str


NAMES = {
    "keras.Function._run_through_graph": Use(
        "run a graph with operations of its own",
        "walk over the nodes of the graph in their order; `keras.models.clone_model` must do it somehow too",
    ),
    "keras.Layer._assert_input_compatibility": Use(
        "check inputs as a layer does when it is called",
        "compare the inputs with `layer.input_spec`, which is public",
    ),
    "keras.Layer._clear_losses": Use(
        "take back a loss that a layer adds while it is traced",
        "see what `Layer.losses` reads, and empty that",
    ),
    "keras.Layer._flatten_layers": Use(
        "find the layers within a layer",
        "go through `Layer._layers`, and the layers in those",
    ),
    "keras.Layer._get_call_context": Use(
        "run a layer's parts as within the layer's own call",
        "see how `Layer.__call__` hands on `training`, and when it forgets the losses of the last call",
    ),
    "keras.Layer._maybe_reset_call_context": Use(
        "end what stands for the layer's own call",
        "as `_get_call_context`",
    ),
    "keras.Model._aggregate_additional_loss": Use(
        "share a penalty among the replicas of tf.distribute as Keras does its own losses",
        "on TensorFlow, divide by the number of replicas; on the other backends, take the loss as it is",
    ),
    "keras.layers.BatchNormalization._moments": Use(
        "know the mean and the variance by which batch normalization divides",
        "compute them of the steps that the mask keeps, with the epsilon that Keras adds to their number",
    ),
    "keras.layers.RNN._maybe_config_dropout_masks": Use(
        "draw the dropout masks of a cell once for all steps",
        "call `get_dropout_mask` and `get_recurrent_dropout_mask` of the cell, or of each of its `cells`",
    ),
    "keras.layers.RNN._maybe_reset_dropout_masks": Use(
        "forget the dropout masks of a cell",
        "call `reset_dropout_mask` and `reset_recurrent_dropout_mask` of the cell, or of each of its `cells`",
    ),
    "keras.src.activations.activations": Use(
        "recognize `keras.activations.relu` in a model",
        "look where `type(keras.Function(x, keras.activations.relu(x, 0.1)).operations[0])` is defined",
    ),
    "keras.src.backend.common.dtypes.BIT64_TO_BIT32_DTYPE": Use(
        "check rules in float64, which Keras turns into float32 on JAX and Torch",
        "see why `keras.backend.result_type('float64', 'float32')` is not float64",
    ),
    "keras.src.backend.common.symbolic_scope.in_symbolic_scope": Use(
        "see that a layer is asked for shapes only",
        "see what `keras.SymbolicScope`, which is public, sets",
    ),
    "keras.src.backend.common.variables.AutocastScope": Use(
        "cast weights to the dtype in which a layer computes",
        "see how `Layer.__call__` casts weights under a policy of mixed precision",
    ),
    "keras.src.backend.get_keras_mask": Use(
        "read the mask that Keras wrote on a tensor",
        "see how `Layer.__call__` finds the masks of its inputs",
    ),
    "keras.src.backend.set_keras_mask": Use(
        "write a mask on a tensor, where Keras' losses and layers look for it",
        "as `get_keras_mask`",
    ),
    "keras.src.ops.node.KerasHistory": Use(
        "say of a symbol that no operation made it",
        "see what `keras.ops` write on a symbol that they are given",
    ),
    "keras.src.utils.naming.to_snake_case": Use(
        "tell names that Keras makes up from those that a user gave",
        "see how `keras.Operation` makes its name from its class",
    ),
} | {
    f"keras.src.ops.{module}": Use(
        f"recognize operations of `keras.ops` in a model (here {example})",
        "look where the type of `keras.Function(x, keras.ops.….(x)).operations[0]` is defined",
    )
    for module, example in {
        "core": "casts and loops",
        "image": "resizing",
        "linalg": "norms",
        "math": "logarithms, error functions, Fourier transforms",
        "nn": "activations, convolutions, pooling",
        "numpy": "sums, products, moves",
    }.items()
}
"""The names that modules and classes have: looked for when jvpreg is imported."""

ATTRIBUTES = {
    "keras.Function._inputs_struct": Use(
        "know the structure of a model's inputs, and the names in it",
        "take it from `keras.Model.get_config`, where `input_layers` is of the same structure",
    ),
    "keras.KerasTensor._keras_history": Use(
        "say of a symbol that no operation made it",
        "see what `keras.ops` write on a symbol that they are given",
    ),
    "keras.Layer._convert_input_args": Use(
        "know the layers that do not cast their inputs, as random flips and crops",
        "name these layers here; under a policy of mixed precision they return what has the dtype of their input",
    ),
    "keras.Layer._layers": Use(
        "tell the list that Keras keeps of a layer's layers from the attributes of the layer's own",
        "see where `Layer.__setattr__` notes a layer",
    ),
    "keras.Layer._losses": Use(
        "forget the losses that another replica added to the same layer",
        "see what `Layer.add_loss` appends to",
    ),
    "keras.Operation._inbound_nodes": Use(
        "read what an operation was called with, and forget the calls of a trace",
        "see what a symbolic call writes on the operation (`Operation.symbolic_call`)",
    ),
    "keras.Operation._outbound_nodes": Use(
        "forget the calls of a trace",
        "see what a symbolic call writes on the operations whose outputs it takes",
    ),
    "keras.layers.Dense._kernel": Use(
        "know the variable of a kernel apart from what LoRA adds to it",
        "find it by its name among `layer.weights`",
    ),
    "keras.src.ops.node.Node.arguments": Use(
        "read what an operation was called with",
        "see from what `Function.call` fills in the arguments of an operation",
    ),
}
"""The names that only instances have: looked for when they are used."""


class MissingKerasNameError(ImportError):
    """Keras has changed: it lacks names that jvpreg needs."""

    def __init__(self, *names: str):
        super().__init__("\n".join(map(_sentence, names)))


def _sentence(name: str) -> str:
    """What is missing and for what it is needed, for somebody who has only installed Keras."""
    known = NAMES.get(name) or ATTRIBUTES.get(name) or NAMES[name.rpartition(".")[0]]
    return (
        f"Keras {keras.__version__} lacks `{name}`, which jvpreg needs to {known.purpose}. "
        f"Install Keras {TESTED}, or a newer jvpreg."
    )


def _named(name: str) -> Any:
    """The object of this full name, which begins with `keras`."""
    return functools.reduce(getattr, name.split(".")[1:], keras)


def _missing(name: str) -> bool:
    try:
        _named(name)
    except AttributeError:
        return True
    return False


if _lacking := list(filter(_missing, NAMES)):
    raise MissingKerasNameError(*_lacking)


def _attribute(owner, name: str) -> Any:
    """The attribute of an instance, by one of the names in `ATTRIBUTES`."""
    try:
        return getattr(owner, name[name.rindex(".") + 1 :])
    except AttributeError:
        raise MissingKerasNameError(name) from None


# ---------------------------------------------------------------- operations


class Operations:
    """The classes of the operations in one of Keras' modules, by which rules know the nodes of a graph: `nn.Relu`."""

    def __init__(self, module: str):
        self._module = module
        classes = {key: value for key, value in vars(_named(module)).items() if isinstance(value, type)}
        vars(self).update({key: value for key, value in classes.items() if issubclass(value, keras.Operation)})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # Of what looks at any object, as doctest does.
            raise AttributeError(name)
        raise MissingKerasNameError(f"{self._module}.{name}")


activation_ops = Operations("keras.src.activations.activations")
core = Operations("keras.src.ops.core")
image = Operations("keras.src.ops.image")
linalg = Operations("keras.src.ops.linalg")
math_ops = Operations("keras.src.ops.math")
nn = Operations("keras.src.ops.nn")
numpy_ops = Operations("keras.src.ops.numpy")


def last_call(operation) -> tuple[tuple, dict]:
    """What an operation was called with, when it was called with symbols for the last time."""
    call = _attribute(operation, "keras.Operation._inbound_nodes")[-1]
    arguments = _attribute(call, "keras.src.ops.node.Node.arguments")
    return arguments.args, arguments.kwargs


def recorded_calls(operation) -> tuple[list, list]:
    """The lists that an operation keeps of its calls with symbols, and of the calls that took their outputs."""
    inbound = _attribute(operation, "keras.Operation._inbound_nodes")
    return inbound, _attribute(operation, "keras.Operation._outbound_nodes")


# ---------------------------------------------------------------- graphs and symbols


_KerasHistory = _named("keras.src.ops.node.KerasHistory")


@functools.cache
def _check_history() -> None:
    # With a name, since Keras would count an input without one, and number those of the user differently.
    _attribute(keras.Input((1,), name="any"), "keras.KerasTensor._keras_history")


def function(inputs: list, outputs) -> keras.Function:
    """The graph from symbols to symbols. `keras.Function` alone would refuse inputs that no operation takes."""
    _check_history()
    for symbol in inputs:
        if not hasattr(symbol, "_keras_history"):  # An operation would write the same, if one took it.
            symbol._keras_history = _KerasHistory(operation=None, node_index=0, tensor_index=0)
    # It looks for symbols in lists, also while `symbol == other` is one more symbol.
    with replaced([(keras.KerasTensor, "__eq__", lambda _, symbol, other: object.__eq__(symbol, other))]):
        return keras.Function(inputs, outputs)


def run_graph(graph: keras.Function, values, operation_fn) -> Any:
    """The outputs of a graph on `values`, with `operation_fn(operation)` in place of each of its operations.

    `keras.models.clone_model` itself runs on it. What is public, `clone_model(call_function=…)`, takes layers only.
    """
    return graph._run_through_graph(values, operation_fn=operation_fn)


def input_structure(graph) -> Any:
    """The inputs of a functional or a built Sequential model in the structure in which they were given to it."""
    if isinstance(graph, keras.Sequential):
        return graph.inputs[0]
    return _attribute(graph, "keras.Function._inputs_struct")


get_mask = _named("keras.src.backend.get_keras_mask")
"""The mask that Keras wrote on a tensor, or None."""

set_mask = _named("keras.src.backend.set_keras_mask")
"""Writes a mask on a tensor."""

asks_for_shapes = _named("keras.src.backend.common.symbolic_scope.in_symbolic_scope")
"""Whether Keras calls a layer for the shapes of its outputs only. Its inputs may be tensors that hold anything."""


# ---------------------------------------------------------------- layers


def layers_within(layer: keras.Layer, itself: bool = True, recursive: bool = True) -> list[keras.Layer]:
    """A layer and the layers that it holds; with `recursive`, those in them too."""
    return layer._flatten_layers(include_self=itself, recursive=recursive)


def attributes(layer: keras.Layer) -> dict[str, Any]:
    """The attributes of a layer, without the list that Keras keeps of the layers among them."""
    # On Torch, attributes that are layers are kept apart from the others.
    children = layer.named_children() if keras.backend.backend() == "torch" else ()
    found = {**vars(layer), **dict(children)}
    if found.pop("_layers", None) is None:
        raise MissingKerasNameError("keras.Layer._layers")
    return found


def check_inputs(layer: keras.Layer, inputs) -> None:
    """Raises a ValueError where inputs do not fit what a layer says of them."""
    layer._assert_input_compatibility(inputs)


@contextlib.contextmanager
def within_call(layer: keras.Layer, training: bool | None = None):
    """A context in which the layers in a layer run as within its own call: in its mode, and their losses are kept.

    Unless another layer's call is under way, the losses of the last call are forgotten, as by Keras.
    """
    call = layer._get_call_context()
    before = getattr(call, "training", None)
    if training is not None:
        call.training = training
    try:
        yield
    finally:
        call.training = before
        layer._maybe_reset_call_context()


def casts_inputs(layer: keras.Layer) -> bool:
    """Whether a layer casts its inputs to the dtype in which it computes."""
    return layer.autocast and _attribute(layer, "keras.Layer._convert_input_args")


def clear_losses(layer: keras.Layer) -> None:
    """Forgets the losses that a layer, or a layer in it, has added."""
    layer._clear_losses()


def clear_own_losses(layer: keras.Layer) -> None:
    """Forgets the losses that a layer itself has added."""
    _attribute(layer, "keras.Layer._losses").clear()


weights_cast_to = _named("keras.src.backend.common.variables.AutocastScope")
"""A context in which weights are read in a dtype, or as they are if it is None: `with weights_cast_to("float16")`."""

name_of_class = _named("keras.src.utils.naming.to_snake_case")
"""The name that Keras makes of that of a class: `max_pooling2d` of `MaxPooling2D`."""


def kernel(layer: keras.Layer) -> keras.Variable:
    """The variable of a layer's kernel. `layer.kernel` is no variable where LoRA adds to it."""
    return _attribute(layer, "keras.layers.Dense._kernel")


def batch_moments(layer: keras.layers.BatchNormalization, x, mask) -> tuple:
    """The mean and the variance of a batch, of the steps that the mask keeps."""
    return layer._moments(x, mask)


class BatchNormalization(keras.layers.BatchNormalization):
    """Keras' own, with moments that a subclass computes."""

    def moments(self, x) -> tuple:
        """The mean and the variance `(C,)` of a batch."""
        raise NotImplementedError

    def _moments(self, inputs, mask):
        return self.moments(inputs)


@contextlib.contextmanager
def dropout_masks(layer: keras.layers.RNN, cell, x, states):
    """A context in which a cell has drawn its dropout masks, for inputs like `x` and `states`."""
    layer._maybe_config_dropout_masks(cell, x, states)
    try:
        yield
    finally:
        layer._maybe_reset_dropout_masks(cell)


# ---------------------------------------------------------------- training and precision


def additional_loss(model: keras.Model, loss) -> Any:
    """A loss beside the compiled one, as a step adds it: under tf.distribute, divided by the number of replicas."""
    return model._aggregate_additional_loss(loss)


@contextlib.contextmanager
def float64_kept():
    """A context in which Keras' type promotion keeps float64, which on JAX and Torch it turns into float32."""
    narrower = _named("keras.src.backend.common.dtypes.BIT64_TO_BIT32_DTYPE")
    before, narrower["float64"] = narrower["float64"], "float64"
    try:
        yield
    finally:
        narrower["float64"] = before
