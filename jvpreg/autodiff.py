"""The backend's forward autodiff, for an operation that has no rule and cannot be opened up."""

from collections.abc import Sequence

import keras
from keras import ops, tree

from jvpreg.examples import mixes_examples
from jvpreg.registry import Pushforward, each_probe


def fall_back(operation, args, kwargs, primals: Sequence):
    """An operation's output, and its pushforward by `keras.ops.jvp`, which runs the operation again for each probe.

    Args:
        operation: a layer or operation.
        args: its arguments.
        kwargs: its keyword arguments.
        primals: the tensors among the arguments, in their order.
    """
    layer = operation if isinstance(operation, keras.Layer) else None
    variables = list(layer.variables) if layer else []
    trainable = [variable for variable in variables if variable.trainable]
    # What the primal pass is about to change: seeds and statistics, as every repetition must find them again.
    state = [(v, ops.convert_to_tensor(v) + 0) for v in variables if not v.trainable]
    found = {id(tensor) for tensor in primals}

    def run(tensors, weights=()):
        remaining = iter(tensors)
        arguments = [args, *kwargs.values()]
        a, *given = tree.map_structure(lambda leaf: next(remaining) if id(leaf) in found else leaf, arguments)
        with keras.StatelessScope(state_mapping=[*state, *weights]):
            outputs = operation(*a, **dict(zip(kwargs, given, strict=True)))
        return tree.flatten(outputs)

    outputs = operation(*args, **kwargs)
    count = len(primals)

    def push(*arguments):
        tangents, frozen = arguments[:count], [residual[0] for residual in arguments[count:]]
        moving = [i for i, tangent in enumerate(tangents) if tangent is not None]

        def along(*moved):
            tensors = list(frozen)
            for i, tensor in zip(moving, moved, strict=True):
                tensors[i] = tensor
            return run(tensors)

        product = each_probe(lambda *rows: _jvp(along, [frozen[i] for i in moving], rows))
        return product(*(tangents[i] for i in moving))

    def part(tangent, *residuals, variable):
        frozen = [residual[0] for residual in residuals]
        value = ops.convert_to_tensor(variable) + 0  # On TensorFlow, a variable converts to itself.
        return each_probe(lambda row: _jvp(lambda w: run(frozen, [(variable, w)]), [value], [row]))(tangent)

    def part_of(variable):
        return lambda tangent, *residuals: part(tangent, *residuals, variable=variable)

    weights = [(variable, part_of(variable)) for variable in trainable]
    # What a layer does along the first axis is not known.
    mixes = layer is None and any(len(x.shape) > 0 and mixes_examples(operation, x) for x in primals[:1])
    return outputs, Pushforward(push, *primals, weights=weights, takes_none=True, couples_examples=mixes)


def _jvp(function, primals: Sequence, tangents: Sequence):
    outputs, products = ops.jvp(function, tuple(primals), tuple(tangents))
    pairs = zip(tree.flatten(outputs), tree.flatten(products), strict=True)
    found = tuple(ops.zeros_like(y) if product is None else product for y, product in pairs)
    return found[0] if len(found) == 1 else found
