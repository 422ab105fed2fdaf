"""Where regularizers look: at the data, at points, or at what a layer returned."""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import keras
from keras import tree

from jvpreg.common.typing import Structure
from jvpreg.engine.starts import check_path, started_at
from jvpreg.linearization import Linearization
from jvpreg.products import linearize
from jvpreg.regularizers.base import JacobianRegularizer
from jvpreg.regularizers.capabilities import Constrains


def is_path(at: str | Callable) -> TypeGuard[str]:
    """Whether a regularizer's `at` is the path of a layer."""
    return isinstance(at, str) and at != "data"


def by_place(regularizers: Sequence[JacobianRegularizer], with_points: bool) -> list[tuple[Any, list[int]]]:
    """The places where they look, each once, with the indices of the regularizers that look there.

    Args:
        regularizers: a list.
        with_points: whether points are places; otherwise those who look at points look at the data.
    """
    places: list[tuple[Any, list[int]]] = []
    for i, regularizer in enumerate(regularizers):
        own = regularizer.at if with_points or is_path(regularizer.at) else "data"
        members = next((members for at, members in places if at == own), None)
        if members is None:
            places.append((own, [i]))
        else:
            members.append(i)
    return places


def part_at(
    linearization: Linearization, regularizers: Sequence[JacobianRegularizer], known: bool = True
) -> Linearization:
    """The Jacobian by what a layer returned, for regularizers that all look there.

    Args:
        linearization: of the whole batch.
        regularizers: one at least.
        known: whether the sizes of what the layer returned are known, which the regularizers then must fit.

    Raises:
        ValueError: there is no such Jacobian, or a regularizer does not fit.
    """
    part = started_at(linearization, str(regularizers[0].at), owner_of(regularizers[0]))
    for regularizer in regularizers if known else ():
        regularizer.check(part.inputs[0], part.outputs)
    return part


def check_layers(regularizers: Sequence[JacobianRegularizer], inputs: Structure, model: keras.Layer) -> None:
    """Raises a ValueError if one looks at a layer, and does not find it, or does not fit what it returns.

    Args:
        regularizers: a list.
        inputs: symbols of the model's inputs, `(B, …)`.
        model: a built model.
    """
    layered = [regularizer for regularizer in regularizers if is_path(regularizer.at)]
    for regularizer in layered:
        others = (
            '"data", "between", a function of points, or ' if isinstance(regularizer, Constrains) else '"data", or '
        )
        check_path(model, str(regularizer.at), owner_of(regularizer), others)

    # Where Keras makes up sizes, they prove nothing. The first step tells then.
    known = all(None not in tuple(leaf.shape)[1:] for leaf in tree.flatten(inputs))

    def check(linearization: Linearization) -> None:
        for regularizer in layered:
            part_at(linearization, [regularizer], known)

    if layered:
        symbolically(model, inputs, check)


def symbolically(model: keras.Layer, inputs: Structure, function: Callable) -> Any:
    """What a function of a model's linearization returns, found by shapes alone; None if Keras cannot run it so.

    Raises:
        ValueError: what the function raises.
    """
    found, refused = list[Any](), list[ValueError]()

    class Trial(keras.Operation):
        def call(self, x: Structure) -> Structure:
            linearization = linearize(model, x, fallback="ignore")
            try:
                found.append(function(linearization))
            except ValueError as error:
                refused.append(error)
            return linearization.outputs

    def two_examples(leaf: keras.KerasTensor) -> keras.KerasTensor:
        # On Torch, Keras may compute numbers after all: for an unknown size, 83 of them.
        sizes = [2 if i == 0 and size is None else size for i, size in enumerate(leaf.shape)]
        return keras.KerasTensor(sizes, leaf.dtype)

    try:
        Trial().compute_output_spec(tree.map_structure(two_examples, inputs))
    except Exception:  # Any operation may fail without numbers. What is wrong shows in the first step then.
        return None
    if refused:
        raise refused[0]
    return found[0]


def owner_of(regularizer: JacobianRegularizer) -> str:
    """A regularizer as errors call it."""
    return f"`{regularizer.name}` ({type(regularizer).__name__})"
