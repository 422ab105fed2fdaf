"""The backend's autodiff, for an operation that has no rule and cannot be opened up."""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import keras
from keras import ops, tree

from jvpreg.common.dtypes import has_tangents
from jvpreg.common.eager import map_leaves
from jvpreg.engine.transpose import transpose
from jvpreg.rules.contract import Pushforward
from jvpreg.rules.examples import of_class
from jvpreg.rules.folding import each_probe


def fall_back(operation, args, kwargs, primals: Sequence):
    """An operation's output, and its pushforward by autodiff, which runs the operation again for each probe.

    The pushforward is None if no output can have a tangent.

    Args:
        operation: a layer or operation.
        args: its arguments.
        kwargs: its keyword arguments.
        primals: the tensors among the arguments, in their order.
    """
    variables = list(getattr(operation, "variables", []))  # of a layer, or of the bodies of a loop
    trainable = [variable for variable in variables if variable.trainable]
    # The primal pass is about to change seeds and statistics, which every repetition must find as they are now. Weights
    # too: on JAX, a scope within that of a step does not see the step's values.
    state = [(v, ops.convert_to_tensor(v) + 0) for v in variables]
    found = {id(tensor) for tensor in primals}
    outputs = operation(*args, **kwargs)
    flat = tree.flatten(outputs)
    # Outputs that have no tangent (an index, a comparison) are hidden from autodiff, which refuses them on JAX.
    moved_outputs = [i for i, y in enumerate(flat) if has_tangents(y)]

    def run(tensors, weights=()):
        remaining = iter(tensors)
        arguments = [args, *kwargs.values()]
        a, *given = map_leaves(lambda leaf: next(remaining) if id(leaf) in found else leaf, arguments)
        with keras.StatelessScope(state_mapping=[*state, *weights]), _twice_differentiable():
            again = tree.flatten(operation(*a, **dict(zip(kwargs, given, strict=True))))
        return tuple(again[i] for i in moved_outputs)

    def jvp(function, at, along):
        products = dict(zip(moved_outputs, along_autodiff(function, at, along), strict=True))
        images = tuple(products.get(i, ops.zeros_like(y)) for i, y in enumerate(flat))
        return images if len(images) > 1 else images[0]

    count = len(primals)
    if not moved_outputs or not (trainable or any(map(has_tangents, primals))):
        return outputs, None

    def push(*arguments):
        tangents, frozen = arguments[:count], [residual[0] for residual in arguments[count:]]
        moving = [i for i, tangent in enumerate(tangents) if tangent is not None]

        def along(*moved):
            tensors = list(frozen)
            for i, tensor in zip(moving, moved, strict=True):
                tensors[i] = tensor
            return run(tensors)

        product = each_probe(lambda *rows: jvp(along, [frozen[i] for i in moving], rows))
        return product(*(tangents[i] for i in moving))

    def part(variable, tangent, *residuals):
        frozen = [residual[0] for residual in residuals]
        value = ops.convert_to_tensor(variable) + 0  # On TensorFlow, a variable converts to itself.
        return each_probe(lambda row: jvp(lambda w: run(frozen, [(variable, w)]), [value], [row]))(tangent)

    weights = [(variable, functools.partial(part, variable)) for variable in trainable]
    after = of_class(operation, [x.shape for x in primals])
    return outputs, Pushforward(push, *primals, weights=weights, takes_none=True, examples=after, finite=False)


def _twice_differentiable():
    """A context in which Torch computes attention by what it can differentiate twice, and not by its fused kernels."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    from torch.nn import attention

    return attention.sdpa_kernel(attention.SDPBackend.MATH)


def along_autodiff(function, primals: Sequence, tangents: Sequence) -> tuple:
    """The derivative of a function, which returns a tuple, along tangents of its primals."""
    if keras.backend.backend() != "tensorflow":
        # Some operations have no forward mode on Torch; those that define their own gradient have none on JAX either.
        with contextlib.suppress(NotImplementedError, RuntimeError, TypeError):
            return tuple(ops.jvp(function, tuple(primals), tuple(tangents))[1])
    # By reverse mode twice: TensorFlow's forward mode fails on loops in a graph, and on what it maps over rows.
    seeds = [ops.zeros_like(y) for y in function(*primals)]

    def pull(cotangents):
        return transpose(lambda at: list(function(*at)), primals, cotangents)

    return tuple(transpose(pull, seeds, list(tangents)))


@dataclass(frozen=True)
class LeftToAutodiff:
    """Why a node was left to the backend's autodiff.

    Attributes:
        kind: the class of its operation.
        reason: in words.
        expected: whether autodiff is the right way for the node, so that no message is needed.
    """

    kind: str
    reason: str
    expected: bool

    def __str__(self):
        return f"{self.kind}: {self.reason}"
