"""One pass for a list of regularizers: what they ask for, what they see, and what they return."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
from keras import ops, tree

from jvpreg.common.typing import Seed, Structure, Tensor
from jvpreg.engine.finite import finite_examples, nan_unless
from jvpreg.linearization import Linearization
from jvpreg.products import linearize
from jvpreg.regularizers.base import JacobianRegularizer, Seen
from jvpreg.regularizers.capabilities import Looks, Scheduled, Searches, is_scheduled
from jvpreg.regularizers.checks import check_carried, check_probes, readable
from jvpreg.regularizers.places import by_place, is_path, part_at


def serve(
    regularizers: Sequence[JacobianRegularizer],
    linearization: Linearization,
    seed: Seed,
    *,
    labels: Sequence | None = None,
    weights: Sequence | None = None,
    carried: Sequence | None = None,
    examples: Tensor | None = None,
    model: keras.Layer | None = None,
) -> "Serving":
    """Draws the random numbers of the regularizers; the result shows them the Jacobian by one pass in each direction.

    Args:
        regularizers: R of them.
        linearization: of the whole batch.
        seed: a `keras.random.SeedGenerator`.
        labels: for each regularizer the labels that it sees, `(B, …)`, or None; by default none.
        weights: for each regularizer the weights of the examples, `(B,)`, or None; by default all are 1.
        carried: for each regularizer the variable that it carries, or None. By default there is none: the caller then
            must not ask for a penalty of a regularizer that carries one.
        examples: indices `(N,)` of the examples whose penalties are computed; by default all.
        model: the model, to be run for a regularizer that looks at points. By default these too look at the data.

    Returns:
        A `Serving`. It draws nothing more, so that it can run in a branch, where no seed may advance.

    Raises:
        ValueError: a regularizer asks for nothing, or for a product with tensors of the wrong shape.
    """
    nothing = [None] * len(regularizers)
    state = [None if variable is None else ops.convert_to_tensor(variable) for variable in carried or nothing]
    places = by_place(regularizers, with_points=model is not None)
    take = _taker(examples)
    given, outputs, labels, weights = take(
        (
            packed(linearization.given_inputs) if any(callable(at) for at, _ in places) else None,
            linearization.outputs,
            list(labels or nothing),
            list(weights or nothing),
        )
    )
    served = []
    for at, members in places:
        members_at = [regularizers[i] for i in members]
        seen = _seen_at(at, linearization, members_at, model, given, seed, labels[members[0]])
        x, y = (packed(seen.inputs), seen.outputs) if callable(at) else (take(packed(seen.inputs)), outputs)
        requests = []
        for i in members:
            if carried is not None:
                check_carried(regularizers[i], state[i], y)
            shown = {} if callable(at) else {"labels": labels[i], "weights": weights[i]}
            requests.append(_request(i, regularizers[i], seen, x, y, seed, carried=state[i], **shown))
        served.append(_Place(seen, None if callable(at) else examples, requests))
    dtype = keras.backend.result_type(tree.flatten(outputs)[0].dtype, "float32")
    return Serving(regularizers, served, carried or nothing, state, dtype)


@dataclass(frozen=True)
class Outcome:
    """What one regularizer returned.

    Attributes:
        penalty: of each example, `(B,)` in float32 at least; NaN where its inputs or outputs are not finite.
        sums: over the examples, for what the regularizer carries; None if it carries nothing.
        measured: what it reports beside its penalty.
    """

    penalty: Any
    sums: Any
    measured: dict


class Served(NamedTuple):
    """What R regularizers returned for the examples that they saw, as `jvpreg.common.replicas.combine` takes it.

    Attributes:
        means: of the penalties, `(R,)`.
        counts: the number of examples of each, `(R,)`.
        measured: what they report beside, one after the other.
        sums: over the examples, for each regularizer that carries something.
    """

    means: Any
    counts: Any
    measured: list
    sums: list


class Serving:
    """Regularizers at a linearization, whose random numbers are drawn: what `serve` returns."""

    def __init__(
        self,
        regularizers: Sequence[JacobianRegularizer],
        places: "list[_Place]",
        variables: Sequence,
        state: Sequence,
        dtype: str,
    ):
        self.regularizers = regularizers
        self._places = places
        self._variables = variables
        self._state = state
        self._dtype = dtype

    def seen(self) -> list[Seen]:
        """What each regularizer sees."""
        return _in_order((request, seen) for place in self._places for request, seen in place.seen())

    def outcomes(self) -> list[Outcome]:
        """What each regularizer returns."""
        return _in_order(pair for place in self._places for pair in place.outcomes())

    def run(self) -> Served:
        """What all of them return, over the examples."""
        reduced = []
        for place in self._places:
            found = place.outcomes()
            count = ops.cast(ops.shape(found[0][1].penalty)[0], self._dtype)
            for request, outcome in found:
                mean = ops.cast(weighted_mean(outcome.penalty, request.weights), self._dtype)
                reduced.append((request, (mean, count, outcome)))
        means, counts, outcomes = zip(*_in_order(reduced), strict=True)
        pairs = zip(self.regularizers, outcomes, strict=True)
        measured = [ops.cast(found.measured[name], self._dtype) for r, found in pairs for name in r.measures]
        sums = [found.sums for found in outcomes if found.sums is not None]
        return Served(ops.stack(means), ops.stack(counts), measured, sums)

    def skip(self) -> Served:
        """Zeros like what `run` returns, for a step without penalties."""
        nothing = ops.zeros((len(self.regularizers),), dtype=self._dtype)
        carriers = [(r, tuple(value.shape)) for r, value in self._carriers()]
        return Served(
            nothing,
            nothing,
            [ops.zeros((), dtype=self._dtype) for _ in self.kinds],
            [ops.zeros(regularizer.sums_shape(shape)) for regularizer, shape in carriers],
        )

    @property
    def kinds(self) -> list[tuple[int, str]]:
        """For each measured number the index of its regularizer, and how the numbers of several steps are combined."""
        return [(i, kind) for i, regularizer in enumerate(self.regularizers) for kind in regularizer.measures.values()]

    def strengths(self, step: Tensor) -> list:
        """The weight of each penalty in the loss at a training step, counted from 1."""
        return [r.strength_at(step) if isinstance(r, Scheduled) else r.strength for r in self.regularizers]

    def carry_on(self, sums: Sequence, active: Tensor = 1.0) -> None:
        """Assigns what is carried to the next step, from the sums over all examples; does nothing if `active` is 0.

        If the numbers of a step are not finite, the variable keeps its value: an optimizer that scales the loss skips
        such a step, and a NaN would never leave the variable.
        """
        variables = [variable for variable in self._variables if variable is not None]
        for (regularizer, value), variable, total in zip(self._carriers(), variables, sums, strict=True):
            new = regularizer.carry(value, total)
            new = ops.where(ops.all(ops.isfinite(new)), new, value)
            variable.assign(new if isinstance(active, float) else ops.where(active > 0, new, value))

    def _carriers(self) -> list[tuple[Any, Any]]:
        """The regularizers that carry something, each with its value."""
        pairs = zip(self.regularizers, self._state, strict=True)
        return [(regularizer, value) for regularizer, value in pairs if value is not None]


def weighted_mean(penalty: Tensor, weights: Tensor) -> Tensor:
    """As Keras reduces a loss: the weighted sum over the number of examples."""
    return ops.mean(penalty if weights is None else penalty * ops.cast(weights, penalty.dtype))


def packed(inputs: list) -> Structure:
    """A model's inputs as the model takes them: one tensor, or a list of several."""
    return inputs[0] if len(inputs) == 1 else inputs


def draw_points(at: Callable, inputs: Structure, seed: Seed, labels: Structure | None = None) -> Structure:
    """Points `(N, …)` like `inputs`, from a function that is marked by `points.by_labels` or does not take the labels.

    Raises:
        ValueError: they are not like the inputs, or would be rounded to integers.
    """
    points = at(inputs, seed, labels) if getattr(at, "by_labels", False) else at(inputs, seed)
    received, expected = ([tuple(t.shape) for t in tree.flatten(structure)] for structure in (points, inputs))
    if [shape[1:] for shape in received] != [shape[1:] for shape in expected]:
        raise ValueError(
            f"Invalid value for argument `at`. Expected points like the inputs, {', '.join(map(readable, expected))}. "
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


@dataclass(frozen=True)
class _Request:
    """What one regularizer asks to see, each `(P, B, …)` or None, and what it gets with it.

    Attributes:
        index: of the regularizer in the list.
        directions, cotangents: what it asks to push forward, and to pull back.
        drawn: its random numbers, for products of its own.
        labels: the labels that it sees.
        weights: of the examples.
        carried: what it carries from step to step, in which it may search for directions.
    """

    index: int
    regularizer: Any
    directions: Any = None
    cotangents: Any = None
    drawn: Any = None
    labels: Any = None
    weights: Any = None
    carried: Any = None


@dataclass(frozen=True)
class _Place:
    """Where regularizers look: a linearization, the indices of the examples if they are a part, and the requests."""

    linearization: Linearization
    examples: Any
    requests: list[_Request]

    def seen(self) -> Iterator[tuple[_Request, Seen]]:
        """What every request gets to see: at most one pass in each direction, and products for those that search."""
        linearization = self.linearization if self.examples is None else self.linearization.take(self.examples)
        inputs, outputs = packed(linearization.inputs), linearization.outputs
        wanted = [request.directions for request in self.requests]
        for i, request in enumerate(self.requests):
            if isinstance(request.regularizer, Searches):
                wanted[i] = request.regularizer.search(linearization, request.carried)
                check_probes(request.regularizer, "search", wanted[i], inputs)
        # Regularizers are shown several inputs as a list, in whatever structure the model takes them.
        pushed = _share(lambda u: linearization.jvp(linearization.pack_inputs(tree.flatten(u))), wanted)
        cotangents = [request.cotangents for request in self.requests]
        pulled = _share(lambda v: packed(linearization.flatten_inputs(linearization.vjp(v))), cotangents)
        # The Jacobian may be finite where the input is not: the slope of ReLU at NaN is 0.
        finite = finite_examples(linearization)
        for request, directions, jvp, vjp in zip(self.requests, wanted, pushed, pulled, strict=True):
            regularizer, found = request.regularizer, None
            if isinstance(regularizer, Looks):
                found = regularizer.look(linearization, request.drawn, request.labels)
            shown = (jvp, vjp, directions, request.cotangents, inputs, outputs, request.labels, found)
            yield request, Seen(*shown, carried=request.carried, weights=request.weights, finite=finite)

    def outcomes(self) -> list[tuple[_Request, Outcome]]:
        """What every request returns."""
        return [(request, _outcome(request, seen)) for request, seen in self.seen()]


def _in_order(pairs: Iterable) -> list:
    """What belongs to requests, in the order of the regularizers."""
    return [found for _, found in sorted(pairs, key=lambda pair: pair[0].index)]


def _seen_at(
    at: str | Callable,
    linearization: Linearization,
    regularizers: list,
    model: Any,
    inputs: Structure,
    seed: Seed,
    labels: Structure | None,
) -> Linearization:
    """What regularizers see that all look at one place; `inputs` as layers take them."""
    if callable(at):
        # Away from the data, the model runs as in inference: it updates no statistics, and drops nothing out.
        points = draw_points(at, inputs, seed, labels)
        return linearize(model, linearization.pack_inputs(tree.flatten(points)))
    return part_at(linearization, regularizers) if is_path(at) else linearization


def _taker(examples: Tensor) -> Callable:
    """A function that takes the examples out of a structure of tensors `(B, …)`; if they are None, it takes all."""
    if examples is None:
        return lambda structure: structure
    taken = dict[int, tuple[Any, Any]]()  # AutoGraph cannot convert a variable that has a type and is closed over

    def take(tensor: Tensor) -> Tensor:
        # Several regularizers may see the same labels. The tensor is kept too, so that no other gets its `id`.
        if id(tensor) not in taken:
            taken[id(tensor)] = tensor, ops.take(tensor, examples, axis=0)
        return taken[id(tensor)][1]

    return lambda structure: tree.map_structure(take, structure, none_is_leaf=False)


def _request(
    index: int,
    regularizer: Any,
    linearization: Linearization,
    inputs: Structure,
    outputs: Structure,
    seed: Seed,
    carried: Tensor,
    **shown: Any,
) -> _Request:
    """What a regularizer asks for, for the examples of `inputs` and `outputs`, which may be a part of the batch."""
    # A copy: Torch computes gradients only after the variable was assigned to.
    shown["carried"] = None if carried is None else ops.copy(carried)
    looks = isinstance(regularizer, Looks)
    drawn = regularizer.draw(linearization, inputs, seed) if looks else None
    if isinstance(regularizer, Searches):
        return _Request(index, regularizer, drawn=drawn, **shown)
    directions = regularizer.directions(inputs, shown.get("labels"), seed)
    cotangents = regularizer.cotangents(outputs, shown.get("labels"), seed)
    if directions is None and cotangents is None and not looks:
        raise ValueError(
            f"`{regularizer.name}` ({type(regularizer).__name__}) asks for no product with the Jacobian. Expected "
            "`directions` or `cotangents` to return tensors, or `jvpreg.regularizers.Looks` among its bases. "
            "Received: None from both."
        )
    check_probes(regularizer, "directions", directions, inputs)
    check_probes(regularizer, "cotangents", cotangents, outputs)
    return _Request(index, regularizer, directions, cotangents, drawn, **shown)


def _outcome(request: _Request, seen: Seen) -> Outcome:
    regularizer, finite = request.regularizer, seen.finite
    penalty = regularizer.penalty(seen)
    batch = tree.flatten(seen.outputs)[0].shape[0]
    if len(penalty.shape) != 1 or (None not in (batch, penalty.shape[0]) and penalty.shape[0] != batch):
        raise ValueError(
            f"`{regularizer.name}` ({type(regularizer).__name__}) returned a penalty of the wrong "
            f"shape. Expected (B,), one number an example. Received: {tuple(penalty.shape)}"
        )
    penalty = nan_unless(finite, ops.cast(penalty, keras.backend.result_type(penalty.dtype, "float32")))
    if regularizer.strength == 0 and not is_scheduled(regularizer):
        # It is only reported. Even a gradient of zeros would do harm: 0 times an infinite slope is NaN.
        penalty = ops.stop_gradient(penalty)
    sums = None if request.carried is None else regularizer.sums(seen, request.carried)
    sums = None if sums is None else ops.where(ops.all(finite), sums, math.nan)
    measured = regularizer.measure(seen) if regularizer.measures else {}
    if set(measured) != set(regularizer.measures):
        raise ValueError(
            f"`measure` of `{regularizer.name}` ({type(regularizer).__name__}) returned other names than `measures` "
            f"has. Expected: {sorted(regularizer.measures)}. Received: {sorted(measured)}"
        )
    return Outcome(penalty, sums, measured)


def _share(product: Callable, wanted: list) -> list:
    """One product for all probes that are wanted, cut into their parts again; None for a part that is not wanted."""
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
