"""Products with the Jacobian of a model of any inputs and outputs, by jvpreg and by the backend's autodiff."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops, tree

import jvpreg
from experiments.benchmark import competitors
from jvpreg.engine.transpose import transpose


@dataclass(frozen=True)
class ZooPoint(competitors.Point):
    """Where a model of a zoo is differentiated, and by what: by its inputs that are no whole numbers, or at a layer.

    Attributes:
        structure: of the model's inputs.
        at: the path of the layer by whose last output it is differentiated instead.
        shape: of that output, if there is such a layer.
        calls: how often the layer is called.
    """

    structure: Any = None
    at: str | None = None
    shape: tuple[int, ...] = ()
    calls: int = 0

    @property
    def x(self) -> Any:
        """The inputs as the model takes them."""
        return tree.pack_sequence_as(self.structure, self.xs)

    @property
    def moving(self) -> list[int]:
        """The places, among the inputs, of those that are differentiated by."""
        return [] if self.at else places_of_floats(self.xs)

    @property
    def primals(self) -> tuple:
        """What is differentiated by: weights, inputs, or what is added to the output of a layer."""
        if self.weights:
            return tuple(self.values[place] for place in self.weights)
        if self.at:
            return (ops.zeros(self.shape, self.model.variable_dtype),)
        return tuple(self.xs[place] for place in self.moving)

    def outputs(self, *primals):
        """The model's outputs as one tensor, as a function of what is differentiated by."""
        values, xs = list(self.values), list(self.xs)
        changed, places = (values, self.weights) if self.weights else (xs, self.moving)
        for place, value in zip(places, primals, strict=False):
            changed[place] = value
        with contextlib.ExitStack() as stack:
            state = list(zip(self.model.variables, values, strict=True))
            stack.enter_context(keras.StatelessScope(state_mapping=state))
            if self.at and not self.weights:
                stack.enter_context(watched(self.model, self.at, primals[0], self.calls - 1))
            return joined(self.model(tree.pack_sequence_as(self.structure, xs), training=self.training))

    def linearize(self, whole: bool = False) -> jvpreg.Linearization:
        """The model frozen here, from its inputs or, unless all of it is asked for, from the layer."""
        lin = jvpreg.linearize(self.model, self.x, training=self.training, fallback="ignore", xla=self.xla)
        return lin.after(self.at) if self.at and not whole else lin

    def tangents(self, vectors: Sequence) -> Any:
        """Vectors like what is differentiated by, as jvpreg takes them: of whole numbers, none."""
        if self.at:
            return vectors[0]
        flat: list[Any] = [None] * len(self.xs)
        for place, vector in zip(self.moving, vectors, strict=True):
            flat[place] = vector
        return tree.pack_sequence_as(self.structure, flat)


def point(model: keras.Model, x: Any, at: str | None = None, **options: Any) -> ZooPoint:
    """The point at inputs `x`; floats are taken in the dtype of the weights.

    Args:
        model: built.
        x: as the model takes it.
        at: the path of a layer.
        **options: attributes of `competitors.Point`.
    """
    xs = [tensor(leaf, model.variable_dtype) for leaf in tree.flatten(x)]
    values = [ops.stop_gradient(ops.convert_to_tensor(variable.value)) for variable in model.variables]
    found = ZooPoint(model, values, tuple(xs), structure=tree.map_structure(lambda leaf: 0, x), **options)
    if at is None:
        return found
    with watched(model, at) as seen:
        found.outputs()
    return dataclasses.replace(found, at=at, shape=seen.shape, calls=seen.calls)


@dataclass
class Watched:
    """What was seen of a layer.

    Attributes:
        calls: how often it was called.
        shape: of its last output.
    """

    calls: int = 0
    shape: tuple[int, ...] = field(default=())


@contextlib.contextmanager
def watched(model: keras.Model, path: str, shift: Any = None, place: int | None = None) -> Iterator[Watched]:
    """A context in which calls of a layer are counted, and a tensor is added to the output of one of them."""
    layer, seen = jvpreg.layer_paths(model)[path], Watched()
    call = layer.call

    @functools.wraps(call)
    def watching(*args, **kwargs):
        output = call(*args, **kwargs)
        seen.calls, seen.shape = seen.calls + 1, tuple(output.shape)
        return output + shift if seen.calls - 1 == place else output

    layer.call = watching
    try:
        yield seen
    finally:
        del layer.call


def tensor(leaf: np.ndarray, dtype: str) -> Any:
    """An input as the model takes it."""
    return ops.convert_to_tensor(leaf, dtype if np.issubdtype(leaf.dtype, np.floating) else None)


def places_of_floats(leaves: Sequence) -> list[int]:
    """The places of those that have a derivative."""
    return [i for i, leaf in enumerate(leaves) if "float" in keras.backend.standardize_dtype(leaf.dtype)]


def joined(structure: Any, outputs: Any = None, axes: int = 1) -> Any:
    """A structure of outputs `(B, …)` as one: the only one as it is, several side by side in `(B, K)`; no integers.

    Args:
        structure: outputs, or products like them.
        outputs: if these are products, the outputs.
        axes: before those that are joined: 2 of products with a probe axis.
    """
    leaves = tree.flatten(structure)
    leaves = [leaves[place] for place in places_of_floats(tree.flatten(structure if outputs is None else outputs))]
    if len(leaves) == 1:
        return leaves[0]
    return ops.concatenate([ops.reshape(leaf, (*leaf.shape[:axes], -1)) for leaf in leaves], axis=axes)


def separated(cotangent: Any, outputs: Any) -> Any:
    """What `joined` joined, as a structure like the outputs: None for integers."""
    leaves = tree.flatten(outputs)
    floats = places_of_floats(leaves)
    if len(floats) == 1:
        parts = [cotangent]
    else:
        sizes = [int(np.prod(leaves[place].shape[1:])) for place in floats]
        cut = ops.split(cotangent, np.cumsum(sizes)[:-1].tolist(), axis=1)
        parts = [ops.reshape(part, leaves[place].shape) for place, part in zip(floats, cut, strict=True)]
    flat: list[Any] = [None] * len(leaves)
    for place, part in zip(floats, parts, strict=True):
        flat[place] = part
    return tree.pack_sequence_as(outputs, flat)


def vectors_of(structure: Any) -> list:
    """The leaves of a product that are there, in the order of the inputs."""
    return [leaf for leaf in tree.flatten(structure) if leaf is not None]


def jvp(at: ZooPoint) -> competitors.Push:
    """By jvpreg, as `competitors.jvp`: tangents go along with `x`, unless they begin within the model."""

    def push(tangents):
        if at.at:
            lin = at.linearize()
            return joined(lin.outputs), joined(lin.jvp(tangents[0]), lin.outputs, axes=2)
        outputs, products = jvpreg.jvp(at.model, at.x, at.tangents(tangents), fallback="ignore", xla=at.xla)
        return joined(outputs), joined(products, outputs, axes=2)

    return push


def autodiff_jvp(at: ZooPoint, tangents: Sequence) -> Any:
    """`J u` by the backend's forward mode."""
    return competitors.forward_mode(at)([ops.expand_dims(tangent, 0) for tangent in tangents])[1][0]


def autodiff_vjp(at: ZooPoint, cotangent: Any) -> list:
    """`Jᵀ v` by reverse mode, for each of what is differentiated by."""
    return transpose(lambda primals: [at.outputs(*primals)], list(at.primals), [cotangent])
