"""A linear map of each example, given by its products, as a whole matrix and as an operator for SciPy."""

from collections.abc import Callable

import numpy as np
from keras import ops, tree

from jvpreg import probes
from jvpreg.common.dtypes import widest_dtype


def materialize(inputs: list, outputs: list, push: Callable, pull: Callable, chunk_size: int):
    """The whole matrix of each example, from its rows or its columns, whichever are fewer.

    Args:
        inputs: tensors `(B, …)` like those that the map takes.
        outputs: tensors `(B, …)` like those that it returns.
        push: the map, of tangents `(P, B, …)`.
        pull: its transpose.
        chunk_size: how many products are computed at once.

    Returns:
        A list over outputs of lists over inputs, of `(B, *output, *input)`.
    """
    sizes = [probes.dimension(inputs), probes.dimension(outputs)]
    by_rows = sizes[1] <= sizes[0]
    space, product = (outputs, pull) if by_rows else (inputs, push)
    batch = ops.shape(inputs[0])[0]
    chunks, dtype = [], widest_dtype(space)
    for start in range(0, min(sizes), chunk_size):
        rows = ops.one_hot(ops.arange(start, min(start + chunk_size, min(sizes))), min(sizes), dtype=dtype)
        directions = ops.broadcast_to(ops.expand_dims(rows, 1), (rows.shape[0], batch, rows.shape[1]))
        images = product(tree.flatten(probes.split(directions, space)))
        chunks.append(ops.concatenate([ops.reshape(t, (*ops.shape(t)[:2], -1)) for t in images], axis=-1))
    # (rows, B, inputs) or (columns, B, outputs) to (B, outputs, inputs).
    matrix = ops.transpose(ops.concatenate(chunks), (1, 0, 2) if by_rows else (1, 2, 0))
    blocks: list[list] = []
    row = 0
    for y in outputs:
        height, column = probes.dimension(y), 0
        blocks.append([])
        for x in inputs:
            width = probes.dimension(x)
            block = matrix[:, row : row + height, column : column + width]
            blocks[-1].append(ops.reshape(block, (*ops.shape(y), *x.shape[1:])))
            column += width
        row += height
    return blocks


def linear_operator(inputs: list, outputs: list, push: Callable, pull: Callable):
    """The map of a batch of one as a `scipy.sparse.linalg.LinearOperator`. Arguments as for `materialize`."""
    from scipy.sparse.linalg import LinearOperator

    dtype = widest_dtype([*inputs, *outputs])

    def multiply(vectors, space, product):
        """`vectors` (n,) or (n, P), as NumPy has them, by way of P probes."""
        columns = np.reshape(vectors, (len(vectors), -1))
        rows = ops.convert_to_tensor(np.ascontiguousarray(columns.T)[:, None], dtype=dtype)
        images = product(tree.flatten(probes.split(rows, space)))
        images = [ops.cast(ops.stop_gradient(t), dtype) for t in images]
        parts = [np.reshape(ops.convert_to_numpy(t), (columns.shape[1], -1)) for t in images]
        return np.concatenate(parts, axis=1).T.reshape(-1, *np.shape(vectors)[1:])

    def forward(vectors):
        return multiply(vectors, inputs, push)

    def backward(vectors):
        return multiply(vectors, outputs, pull)

    return LinearOperator(
        (probes.dimension(outputs), probes.dimension(inputs)),
        matvec=forward,
        rmatvec=backward,
        matmat=forward,
        rmatmat=backward,
        dtype=dtype,
    )
