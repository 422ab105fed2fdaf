"""Whether one can train with a list of regularizers, by itself and with a model."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import tree

from jvpreg.common import checks
from jvpreg.common.typing import Shape, Structure, Tensor
from jvpreg.engine.inputs import graph_of, instead_of_integers
from jvpreg.engine.starts import possible_starts
from jvpreg.linearization import Linearization
from jvpreg.regularizers.base import JacobianRegularizer
from jvpreg.regularizers.capabilities import Carries, Constrains, Looks, Scheduled, Searches
from jvpreg.regularizers.places import check_layers, is_path, owner_of, symbolically

# Methods that only a regularizer with this base class is asked for.
HOOKS: dict[str, type] = {
    "draw": Looks,
    "look": Looks,
    "carried_shape": Carries,
    "sums_shape": Carries,
    "sums": Carries,
    "carry": Carries,
    "search": Searches,
    "strength_at": Scheduled,
    "contradicts": Constrains,
    "measure": Constrains,
}

# And attributes.
ATTRIBUTES: dict[str, type] = {"scheduled": Scheduled, "measures": Constrains}


def check_regularizers(regularizers: Any, argument: str) -> tuple[JacobianRegularizer, ...]:
    """The regularizers as a tuple; None is an empty one.

    Raises:
        ValueError: it is not a list of regularizers; one has a method without the base class that asks for it; or two
            of them contradict each other.
    """
    several = isinstance(regularizers, (list, tuple))
    if regularizers is not None and not (several and all(isinstance(r, JacobianRegularizer) for r in regularizers)):
        raise checks.invalid(argument, "a list of `jvpreg.regularizers.JacobianRegularizer`", regularizers)
    for regularizer in regularizers or ():
        for hook, kind in HOOKS.items():
            if callable(getattr(type(regularizer), hook, None)) and not isinstance(regularizer, kind):
                raise _lacks_base(argument, regularizer, kind, f"a method `{hook}`")
        for attribute, kind in ATTRIBUTES.items():
            if getattr(regularizer, attribute, None) and not isinstance(regularizer, kind):
                raise _lacks_base(argument, regularizer, kind, f"`{attribute}`")
        for measure, combined in regularizer.measures.items():
            checks.choice(f"measures[{measure!r}]", combined, ("mean", "max", "last"))
    for one, other in itertools.permutations(regularizers or (), 2):
        reason = one.contradicts(other) if isinstance(one, Constrains) else None
        if reason is not None:
            raise ValueError(
                f"Invalid value for argument `{argument}`. Expected constraints that can hold together. Received: "
                f"`{one.name}` ({type(one).__name__}) and `{other.name}` ({type(other).__name__}), {reason}"
            )
    return tuple(regularizers or ())


def _lacks_base(argument: str, regularizer: JacobianRegularizer, kind: type, what: str) -> ValueError:
    return ValueError(
        f"Invalid value for argument `{argument}`. Expected `jvpreg.regularizers.{kind.__name__}` among the bases of a "
        f"regularizer that has {what}. Received: `{regularizer.name}` ({type(regularizer).__name__})"
    )


def check_fit(
    regularizers: Sequence[JacobianRegularizer], inputs: Structure, outputs: Structure, model: keras.Layer
) -> None:
    """Raises a ValueError if one does not fit a model, with such inputs and outputs, symbols `(B, …)`."""
    for regularizer in regularizers:
        if not is_path(regularizer.at):
            regularizer.check(inputs, outputs)
    check_layers(regularizers, inputs, model)


def check_inputs(regularizers: Sequence[JacobianRegularizer], model: keras.Layer) -> None:
    """Raises a ValueError if a model takes integers only and a regularizer looks along its inputs."""
    graph = graph_of(model)
    dtypes = [] if graph is None else [keras.backend.standardize_dtype(tensor.dtype) for tensor in graph.inputs]
    # Bytes stand for the real numbers of an image.
    if graph is not None and not any(keras.backend.is_float_dtype(dtype) or dtype == "uint8" for dtype in dtypes):
        inputs = graph.inputs[0] if len(dtypes) == 1 else list(graph.inputs)
        starts = functools.partial(symbolically, model, inputs, possible_starts)
        _refuse_constant(regularizers, f"`{model.name}` takes integers alone, {dtypes}", starts)


def check_dependence(
    regularizers: Sequence[JacobianRegularizer], linearization: Linearization, model: keras.Layer
) -> None:
    """Raises a ValueError if the Jacobian is zero whatever the weights are, and a regularizer looks at it."""
    if linearization.is_constant:
        reason = f"The outputs of `{model.name}` do not depend on an input of real numbers"
        _refuse_constant(regularizers, reason, lambda: possible_starts(linearization))


def check_carried(regularizer: JacobianRegularizer, carried: Tensor | None, outputs: Structure) -> None:
    """Raises if the variable that a regularizer carries does not exist."""
    if carried is None and isinstance(regularizer, Carries) and regularizer.carried_shape(outputs) is not None:
        raise ValueError(
            f"`{regularizer.name}` ({type(regularizer).__name__}) carries a variable from step to step, whose "
            "shape was not known when the model was compiled. Give the model a `keras.Input`, or call the "
            "`JacobianModel` on a batch before `compile`."
        )


def check_probes(regularizer: Any, method: str, probes: Structure | None, like: Structure) -> None:
    """Raises if `probes` are not `(P, B, …)` like the tensors of `like`."""
    if probes is None:
        return
    received = [tuple(probe.shape) for probe in tree.flatten(probes)]
    expected = [tuple(tensor.shape) for tensor in tree.flatten(like)]
    # The batch is left to the product itself: in a TensorFlow graph it is not known here.
    if [shape[2:] if len(shape) > 1 else None for shape in received] != [shape[1:] for shape in expected]:
        raise ValueError(
            f"`{method}` of `{regularizer.name}` ({type(regularizer).__name__}) returned tensors of the wrong shape. "
            f"Expected a leading axis of P probes before {', '.join(map(readable, expected))}. "
            f"Received: {', '.join(map(str, received))}. For one probe, use `keras.ops.expand_dims(…, 0)`."
        )


def readable(shape: Shape) -> str:
    """A shape as errors show it, with B for the batch."""
    return "(" + ", ".join(["B", *map(str, shape[1:])]) + ")"


def _refuse_constant(regularizers: Sequence[JacobianRegularizer], reason: str, starts: Callable) -> None:
    for regularizer in regularizers:
        # A regularizer that `Looks` may look at nodes inside, where there is a Jacobian.
        if not isinstance(regularizer, Looks) and not is_path(regularizer.at):
            raise ValueError(
                f"{reason}: integers have no Jacobian, and {owner_of(regularizer)} would be 0. "
                f"{instead_of_integers(starts() or [])}"
            )
