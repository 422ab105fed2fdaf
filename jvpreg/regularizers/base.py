"""The base class of Jacobian regularizers, and the one tangent pass that a list of them shares."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import ops, tree

from jvpreg import checks
from jvpreg.finite import finite_examples, nan_unless
from jvpreg.inputs import graph_of
from jvpreg.linearization import Linearization


@dataclass(frozen=True)
class Seen:
    """What a regularizer sees when it is asked for its penalty.

    Attributes:
        jvp: `J u` for its own directions, `(P, B, …)` like the outputs; None if it gave none.
        vjp: `Jᵀ v` for its own cotangents, `(Q, B, …)` like the inputs; None if it gave none.
        directions: the directions u, `(P, B, …)`, or None.
        cotangents: the cotangents v, `(Q, B, …)`, or None.
        inputs: the model's inputs, `(B, …)`, a list if there are several.
        outputs: the model's outputs, `(B, …)`.
        labels: the labels given to `fit`, or None. Those that are a regularizer's own are seen by those alone that have
            labels of their own: they get the dict as it was given, the others what the loss gets.
        found: what `look` returned.
        carried: what the regularizer carries from step to step, or None.
        weights: the weight of each example in the loss, `(B,)`, or None: all are 1.
        finite: whether the inputs and outputs of each example are finite, `(B,)`, or None: all are. What is measured
            where they are not is not known, though the Jacobian may be finite: a slope of 0 hides what is no number.
        computed: what its methods put here for each other.
    """

    jvp: Any
    vjp: Any
    directions: Any
    cotangents: Any
    inputs: Any
    outputs: Any
    labels: Any
    found: Any = None
    carried: Any = None
    weights: Any = None
    finite: Any = None
    computed: dict = field(default_factory=dict, repr=False, compare=False)


class JacobianRegularizer:
    """Base class: a subclass says where it looks, and what it charges for what it sees. It never runs the model.

    Override `directions` (for products `J u`), `cotangents` (for `Jᵀ v`), or both, and `penalty`; and `get_config`
    if `__init__` takes more arguments. The directions of all regularizers of a model go through one tangent pass.

    Args:
        strength: the penalty's weight in the loss, not negative: the loss gains `strength × mean(penalty)`. With 0 the
            penalty is reported, and not trained on, unless it is `scheduled`.
        name: of its metric; by default the class's name in snake case.

    Attributes:
        at: where it looks: `"data"`, or a function `(inputs, seed) -> points (N, …)`. Regularizers with equal
            functions share the points and the one run of the model at them. The inputs are as the model's layers take
            them: whole numbers, such as codes of categories, as such, and bytes as floats.
        default_name: of its metric, which is the mean of its penalty over the examples, without its strength; the
            class's name in snake case if it is empty.
        label_keys: keys of a dict of labels that are its own, which neither the loss nor a metric gets to see.
        measures: what it reports beside its penalty, by name, and how steps are put together: `"mean"`, `"max"` or
            `"last"`.
        carried_start: how what it carries starts: `"normal"` or `"zeros"`.
        scheduled: whether `strength_at` depends on the step.

    Raises:
        ValueError: `strength` is negative or not finite.

    Example:

    >>> import keras, jvpreg
    >>> @keras.saving.register_keras_serializable(package="examples")
    ... class BrightnessInvariance(jvpreg.regularizers.JacobianRegularizer):
    ...     def directions(self, inputs, labels, seed):
    ...         return keras.ops.expand_dims(keras.ops.ones_like(inputs), 0)
    ...     def penalty(self, seen):
    ...         return keras.ops.sum(seen.jvp[0] ** 2, axis=-1)
    >>> BrightnessInvariance(0.1).name
    'brightness_invariance'
    """

    default_name = ""
    at: str | Callable = "data"
    label_keys: tuple[str, ...] = ()
    measures: Mapping[str, str] = {}
    carried_start = "normal"
    scheduled = False

    def __init__(self, strength: float, name: str | None = None):
        self.strength = checks.number("strength", strength, least=0, owner=type(self).__name__)
        snake_case = re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()
        self.name = checks.text("name", name, optional=True) or self.default_name or snake_case

    def check(self, inputs, outputs) -> None:
        """Raises a ValueError where it does not fit a model of such inputs and outputs, `(B, …)`, at `compile`."""
        return

    def contradicts(self, other: "JacobianRegularizer") -> str | None:
        """In what the two cannot both hold, in words; None if they can, as far as can be told beforehand."""
        return None

    def strength_at(self, step):
        """The weight in the loss at a training step, counted from 1."""
        return self.strength

    def directions(self, inputs, labels, seed):
        """Directions `(P, B, …)` like `inputs`, to be pushed forward; or None.

        Draw random ones by `jvpreg.probes.draw`: a replica of `tf.distribute` then draws those that one device would
        draw for its examples. What `keras.random` draws is the same on each replica.
        """
        return

    def cotangents(self, outputs, labels, seed):
        """Cotangents `(Q, B, …)` like `outputs`, to be pulled back; or None."""
        return

    def draw(self, linearization: Linearization, inputs, seed):
        """What `look` needs at random, for the examples of `inputs`, which may be a part of the batch."""
        return

    def look(self, linearization: Linearization, drawn, labels):
        """Whatever else it wants to see, by products of its own: it becomes `seen.found`. `drawn` is from `draw`."""
        return

    def carried_shape(self, outputs) -> tuple[int, ...] | None:
        """The shape of a variable that is carried from step to step, for outputs `(B, …)`; by default there is none.

        It is not trained, starts as `carried_start` says, and is saved with the model.
        """
        return None

    def search(self, linearization: Linearization, carried):
        """Directions `(P, B, …)` like the inputs, for a regularizer that finds them from what it carries.

        Products with the Jacobian may be asked for here, at their own cost. Overridden, it takes the place of
        `directions`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override `search`.")

    def sums_shape(self, carried_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what `sums` returns; by default that of what is carried."""
        return carried_shape

    def sums(self, seen: Seen, carried):
        """What `carry` needs of the examples, a tensor of sums over them, once the products were seen.

        Under `tf.distribute` each replica sees some of the examples, and `carry` gets the sums over all.
        """
        raise NotImplementedError(f"{type(self).__name__} carries a variable and must override `sums`.")

    def carry(self, carried, sums):
        """What is carried to the next step. Where it is not finite, what was carried before is kept."""
        raise NotImplementedError(f"{type(self).__name__} carries a variable and must override `carry`.")

    def penalty(self, seen: Seen):
        """The penalty of each example, `(B,)`, from what was seen."""
        raise NotImplementedError(f"{type(self).__name__} must override `penalty(self, seen)`.")

    def measure(self, seen: Seen) -> dict:
        """A scalar for each of `measures`, by its name."""
        return {}

    def get_config(self) -> dict:
        """The arguments of `__init__`, as Keras serializes them."""
        return {"strength": self.strength, "name": self.name}

    @classmethod
    def from_config(cls, config: dict) -> "JacobianRegularizer":
        """The regularizer that `get_config` described."""
        return cls(**config)


def check_regularizers(regularizers, argument: str) -> tuple[JacobianRegularizer, ...]:
    """The regularizers as a tuple; None is an empty one.

    Raises:
        ValueError: it is not a list of regularizers, or two of them contradict each other.
    """
    several = isinstance(regularizers, (list, tuple))
    if regularizers is not None and not (several and all(isinstance(r, JacobianRegularizer) for r in regularizers)):
        raise checks.invalid(argument, "a list of `jvpreg.regularizers.JacobianRegularizer`", regularizers)
    for one, other in itertools.combinations(regularizers or (), 2):
        if reason := one.contradicts(other):
            raise ValueError(
                f"Invalid value for argument `{argument}`. Expected constraints that can hold together. Received: "
                f"`{one.name}` ({type(one).__name__}) and `{other.name}` ({type(other).__name__}), {reason}"
            )
    return tuple(regularizers or ())


def check_inputs(regularizers: Sequence[JacobianRegularizer], model) -> None:
    """Raises a ValueError where a graph says that it takes integers alone, and a regularizer looks along its inputs."""
    graph = graph_of(model)
    dtypes = [] if graph is None else [keras.backend.standardize_dtype(tensor.dtype) for tensor in graph.inputs]
    # Bytes stand for the real numbers of an image.
    if dtypes and not any(keras.backend.is_float_dtype(dtype) or dtype == "uint8" for dtype in dtypes):
        _refuse_constant(regularizers, f"`{model.name}` takes integers alone, {dtypes}")


def check_dependence(regularizers: Sequence[JacobianRegularizer], linearization: Linearization, model) -> None:
    """Raises a ValueError where the Jacobian is zero whatever the weights, and a regularizer looks at it."""
    if linearization.is_constant:
        _refuse_constant(regularizers, f"The outputs of `{model.name}` do not depend on an input of real numbers")


def _refuse_constant(regularizers: Sequence[JacobianRegularizer], reason: str) -> None:
    for regularizer in regularizers:
        # What only looks may look at nodes, whose Jacobians there are.
        if type(regularizer).look is JacobianRegularizer.look:
            raise ValueError(
                f"{reason}: there is no Jacobian by an integer, and `{regularizer.name}` would be 0. Put the layers "
                "after the embedding into a `jvpreg.layers.JacobianPenalty`, or let the model take floats if the "
                "integers are measured numbers."
            )


def carried_name(name: str) -> str:
    """The name of the variable that a regularizer carries, by its own name: of no slash, which would be a folder."""
    return f"carried_{name.replace('/', '>')}"


def carried_initializer(regularizer: JacobianRegularizer, seed: int) -> keras.initializers.Initializer:
    """Of the variable that it carries."""
    if regularizer.carried_start == "zeros":
        return keras.initializers.Zeros()
    return keras.initializers.RandomNormal(stddev=1.0, seed=seed)


@dataclass(frozen=True)
class Request:
    """What one regularizer asks to see: its directions and cotangents, each `(P, B, …)` or None.

    Attributes:
        labels: those that it gets to see.
        carried: what it carries from step to step, from which its directions may be found later.
        drawn: what it drew for products of its own.
    """

    regularizer: JacobianRegularizer
    directions: Any
    cotangents: Any
    labels: Any = None
    carried: Any = None
    drawn: Any = None


def requests(
    regularizers: Sequence[JacobianRegularizer],
    linearization: Linearization,
    inputs,
    outputs,
    labels: Sequence,
    seed,
    carried: Sequence | None = None,
) -> list[Request]:
    """Draws what every regularizer wants at random.

    Args:
        regularizers: the regularizers.
        linearization: of the whole batch.
        inputs: of the examples that the penalties are for, as the model takes them.
        outputs: theirs.
        labels: those that each regularizer gets to see.
        seed: a `keras.random.SeedGenerator`.
        carried: what each regularizer carries, or None.

    Raises:
        ValueError: a regularizer asks for nothing, or for a product with tensors of the wrong shape.
    """
    drawn = []
    states = carried or [None] * len(regularizers)
    for regularizer, own_labels, state in zip(regularizers, labels, states, strict=True):
        if state is not None:
            # A copy: Torch takes gradients after the variable was assigned to.
            state = ops.copy(state)
        if state is not None and _searches(regularizer):
            drawn.append(Request(regularizer, None, None, own_labels, state))
            continue
        if state is None and regularizer.carried_shape(outputs) is not None:
            raise ValueError(
                f"`{regularizer.name}` ({type(regularizer).__name__}) carries a variable from step to step, whose "
                "shape was not known when the model was compiled. Give the model a `keras.Input`, or call the "
                "`JacobianModel` on a batch before `compile`."
            )
        directions = regularizer.directions(inputs, own_labels, seed)
        cotangents = regularizer.cotangents(outputs, own_labels, seed)
        looks = type(regularizer).look is not JacobianRegularizer.look
        if directions is None and cotangents is None and not looks:
            raise ValueError(
                f"`{regularizer.name}` ({type(regularizer).__name__}) asks for no product with the Jacobian. Expected "
                "`directions` or `cotangents` to return tensors. Received: None from both."
            )
        for method, probes, like in (("directions", directions, inputs), ("cotangents", cotangents, outputs)):
            _check_probes(regularizer, method, probes, like)
        own = regularizer.draw(linearization, inputs, seed) if looks else None
        drawn.append(Request(regularizer, directions, cotangents, own_labels, state, own))
    return drawn


def _searches(regularizer) -> bool:
    return type(regularizer).search is not JacobianRegularizer.search


def _check_probes(regularizer, method: str, probes, like) -> None:
    """Raises if `probes` are not `(P, B, …)` like the tensors of `like`."""
    if probes is None:
        return
    received = [tuple(probe.shape) for probe in tree.flatten(probes)]
    expected = [tuple(tensor.shape) for tensor in tree.flatten(like)]
    # The batch is left to the product itself: in a TensorFlow graph it is not known here.
    if [shape[2:] if len(shape) > 1 else None for shape in received] != [shape[1:] for shape in expected]:
        raise ValueError(
            f"`{method}` of `{regularizer.name}` ({type(regularizer).__name__}) returned tensors of the wrong shape. "
            f"Expected a leading axis of P probes before {', '.join(map(_readable, expected))}. "
            f"Received: {', '.join(map(str, received))}. For one probe, use `keras.ops.expand_dims(…, 0)`."
        )


def _readable(shape) -> str:
    return "(" + ", ".join(["B", *map(str, shape[1:])]) + ")"


@dataclass(frozen=True)
class Outcome:
    """What came of one request.

    Attributes:
        penalty: of each example, `(B,)` in float32; NaN where its inputs or outputs are not finite.
        sums: of the examples, for what the regularizer carries on; None if that is nothing.
        measured: what it reports beside its penalty.
    """

    penalty: Any
    sums: Any
    measured: dict


def outcomes(linearization: Linearization, asked: Sequence[Request], weights: Sequence | None = None) -> list[Outcome]:
    """What comes of every request; `weights` are those of the examples, `(B,)` or None, for each.

    At most one pass in each direction, beside what a regularizer searches with.
    """
    inputs = linearization.inputs[0] if len(linearization.inputs) == 1 else linearization.inputs
    outputs = linearization.outputs
    wanted = [request.directions for request in asked]
    for i, request in enumerate(asked):
        if request.carried is not None and _searches(request.regularizer):
            wanted[i] = request.regularizer.search(linearization, request.carried)
            _check_probes(request.regularizer, "search", wanted[i], inputs)
    pushed = _share(linearization.jvp, wanted)
    pulled = _share(linearization.vjp, [request.cotangents for request in asked])
    result = []
    weights = weights or [None] * len(asked)
    # A nonlinearity may hide what is not a number from the Jacobian, by a slope of 0.
    finite = finite_examples(linearization)
    for request, directions, jvp, vjp, weight in zip(asked, wanted, pushed, pulled, weights, strict=True):
        regularizer, labels = request.regularizer, request.labels
        found = regularizer.look(linearization, request.drawn, labels)
        shown = (jvp, vjp, directions, request.cotangents, inputs, outputs, labels, found)
        seen = Seen(*shown, carried=request.carried, weights=weight, finite=finite)
        penalty = regularizer.penalty(seen)
        batch = tree.flatten(outputs)[0].shape[0]
        if len(penalty.shape) != 1 or (None not in (batch, penalty.shape[0]) and penalty.shape[0] != batch):
            raise ValueError(
                f"`{regularizer.name}` ({type(regularizer).__name__}) returned a penalty of the wrong "
                f"shape. Expected (B,), one number an example. Received: {tuple(penalty.shape)}"
            )
        penalty = nan_unless(finite, ops.cast(penalty, keras.backend.result_type(penalty.dtype, "float32")))
        if regularizer.strength == 0 and not regularizer.scheduled:
            # It is only reported. A gradient of zeros would still be one: 0 times an infinite slope is not a number.
            penalty = ops.stop_gradient(penalty)
        sums = None if request.carried is None else regularizer.sums(seen, request.carried)
        sums = None if sums is None else ops.where(ops.all(finite), sums, math.nan)
        result.append(Outcome(penalty, sums, regularizer.measure(seen)))
    return result


def carry_on(regularizer: JacobianRegularizer, carried, sums):
    """What is carried to the next step.

    A step whose numbers are not finite leaves it as it was: an optimizer that scales the loss skips such a step, and a
    NaN would stay in it for good.
    """
    new = regularizer.carry(carried, sums)
    return ops.where(ops.all(ops.isfinite(new)), new, carried)


def by_points(regularizers: Sequence[JacobianRegularizer]) -> list[tuple[Any, list[int]]]:
    """Where they look, each place once, and the indices of those that look there."""
    places: list[tuple[Any, list[int]]] = []
    for i, regularizer in enumerate(regularizers):
        members = next((members for at, members in places if at == regularizer.at), None)
        if members is None:
            places.append((regularizer.at, [i]))
        else:
            members.append(i)
    return places


def draw_points(at: Callable, inputs, seed):
    """Points `(N, …)` like `inputs`.

    Raises:
        ValueError: they are not like them, or would be cut to whole numbers.
    """
    points = at(inputs, seed)
    received, expected = ([tuple(t.shape) for t in tree.flatten(structure)] for structure in (points, inputs))
    if [shape[1:] for shape in received] != [shape[1:] for shape in expected]:
        raise ValueError(
            f"Invalid value for argument `at`. Expected points like the inputs, {', '.join(map(_readable, expected))}. "
            f"Received: {', '.join(map(str, received))} from {at!r}"
        )
    for x, drawn in zip(tree.flatten(inputs), tree.flatten(points), strict=True):
        dtypes = [keras.backend.standardize_dtype(tensor.dtype) for tensor in (x, drawn)]
        if [keras.backend.is_float_dtype(dtype) for dtype in dtypes] == [False, True]:
            raise ValueError(
                f"Invalid value for argument `at`. Expected whole numbers ({dtypes[0]}), as the model takes them, for "
                f"an input of them. Received: {dtypes[1]} from {at!r}"
            )
    return points


def _share(product, wanted: list) -> list:
    """One product with all the probes that are wanted, cut up again; None where nothing is wanted."""
    given = [probes for probes in wanted if probes is not None]
    if not given:
        return [None] * len(wanted)
    counts = [tree.flatten(probes)[0].shape[0] for probes in given]
    joined = given[0] if len(given) == 1 else tree.map_structure(lambda *parts: ops.concatenate(parts), *given)
    products = product(joined)
    shares, start = [], 0
    for count in counts:
        stop = start + count
        shares.append(tree.map_structure(lambda t, start=start, stop=stop: t[start:stop], products))
        start = stop
    remaining = iter(shares if len(given) > 1 else [products])
    return [None if probes is None else next(remaining) for probes in wanted]
