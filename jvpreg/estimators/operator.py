"""What estimators work on: a linear map for each example of a batch, known by its products."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import keras
import numpy as np
from keras import ops, tree

from jvpreg import probes
from jvpreg.common import checks
from jvpreg.common.dtypes import widest_dtype
from jvpreg.common.typing import DType, Seed, Structure, Tensor
from jvpreg.engine.finite import finite_examples, nan_unless
from jvpreg.linearization import Linearization

P = ParamSpec("P")
R = TypeVar("R")


class Operator:
    """A linear map `A` for each example of a batch, known by its products only.

    Args:
        matvec: `A v` for P vectors of each example at once: `(P, B, n)` to `(P, B, m)`.
        rmatvec: `Aᵀ v`: `(P, B, m)` to `(P, B, n)`; None if it is not known: an estimate that needs it then raises.
        shape: `(m, n)`, the dimensions of its outputs and of its inputs.
        batch_size: B.
        dtype: of the vectors; by default that of Keras.
        chunk_size: how many vectors of each example go through one product, which bounds the memory.

    Raises:
        ValueError: an argument is out of its range.

    Example:

    >>> import keras, numpy as np
    >>> from jvpreg.estimators import Operator, trace
    >>> matrix = np.diag([1.0, 2.0, 3.0]).astype("float32")
    >>> operator = Operator(lambda v: keras.ops.matmul(v, matrix.T), None, shape=(3, 3), batch_size=1)
    >>> float(keras.ops.convert_to_numpy(trace(operator).value)[0])
    6.0
    """

    def __init__(
        self,
        matvec: Callable[[Tensor], Tensor],
        rmatvec: Callable[[Tensor], Tensor] | None,
        shape: Sequence[int],
        batch_size: int | Tensor,
        dtype: DType | None = None,
        chunk_size: int = 16,
    ):
        several = (list, tuple, np.ndarray)
        sizes = [int(size) for size in shape if checks.is_integer(size)] if isinstance(shape, several) else []
        if len(sizes) != 2 or len(shape) != 2 or min(sizes) < 1:
            raise checks.invalid("shape", "(m, n), two positive integers", shape)
        self._matvec = checks.function("matvec", matvec, "a function of vectors (P, B, n)")
        self._rmatvec = checks.function("rmatvec", rmatvec, "a function of vectors (P, B, m)", optional=True)
        self.shape = (sizes[0], sizes[1])
        # In a graph the batch size may be a tensor.
        self.batch_size = batch_size if ops.is_tensor(batch_size) else checks.count("batch_size", batch_size)
        self.dtype = checks.float_dtype("dtype", keras.config.floatx() if dtype is None else dtype)
        self.chunk_size = checks.count("chunk_size", chunk_size)

    @property
    def has_transpose(self) -> bool:
        """Whether products with the transpose are known."""
        return self._rmatvec is not None

    @property
    def is_square(self) -> bool:
        """Whether inputs and outputs have the same dimension."""
        return self.shape[0] == self.shape[1]

    def matvec(self, vectors: Tensor) -> Tensor:
        """`A v` of each: `(P, B, n)` to `(P, B, m)`."""
        return self._in_chunks(self._matvec, vectors, self.shape[0])

    def rmatvec(self, vectors: Tensor) -> Tensor:
        """`Aᵀ v` of each: `(P, B, m)` to `(P, B, n)`.

        Raises:
            ValueError: the transpose is not known.
        """
        if self._rmatvec is None:
            raise ValueError(
                "This estimate needs products with the transpose. Received: an operator without `rmatvec`."
            )
        return self._in_chunks(self._rmatvec, vectors, self.shape[1])

    @property
    def transpose(self) -> "Operator":
        """`Aᵀ`."""
        rows, columns = self.shape
        return Operator(self.rmatvec, self.matvec, (columns, rows), self.batch_size, self.dtype, self.chunk_size)

    @property
    def upright(self) -> "Operator":
        """`A` or `Aᵀ`, whichever has no more inputs than outputs: the same singular values."""
        return self if self.shape[1] <= self.shape[0] else self.transpose

    def over(self, unit: Tensor) -> "Operator":
        """`A` divided by a unit for each example, `(B,)`: see `magnitude`."""
        unit = ops.expand_dims(unit, -1)
        backward = None if self._rmatvec is None else lambda v: self.rmatvec(v) / unit
        return Operator(
            lambda v: self.matvec(v) / unit, backward, self.shape, self.batch_size, self.dtype, self.chunk_size
        )

    def magnitude(self, seed: Seed) -> Tensor:
        """A rough size of `A`, by one product: the largest entry in the image of a random vector, `(B,)`."""
        return magnitude(self.matvec(self.draw("sphere", 1, seed)))

    def basis(self) -> Tensor:
        """The canonical basis of the inputs, `(n, B, n)`."""
        size = self.shape[1]
        return ops.broadcast_to(ops.expand_dims(ops.eye(size, dtype=self.dtype), 1), (size, self.batch_size, size))

    def draw(self, kind: str, num_probes: int, seed: Seed) -> Tensor:
        """Random vectors of the inputs, `(P, B, n)`: see `jvpreg.probes.draw`."""
        return probes.draw(kind, ops.zeros((self.batch_size, self.shape[1]), self.dtype), num_probes, seed)

    def _in_chunks(self, product: Callable, vectors: Tensor, size: int) -> Tensor:
        count, chunk = vectors.shape[0], self.chunk_size
        if count <= chunk:
            return ops.cast(product(vectors), self.dtype)
        missing = -count % chunk
        vectors = ops.pad(vectors, ((0, missing), (0, 0), (0, 0)))
        images = ops.zeros((count + missing, self.batch_size, size), self.dtype)

        def step(i: Tensor, images: Tensor) -> Tensor:
            part = ops.slice(vectors, (i * chunk, 0, 0), (chunk, self.batch_size, vectors.shape[2]))
            return ops.slice_update(images, (i * chunk, 0, 0), ops.cast(product(part), self.dtype))

        return ops.fori_loop(0, (count + missing) // chunk, step, images)[:count]


def by_example(estimator: Callable[P, R]) -> Callable[P, R]:
    """An estimator with NaN, and nothing converged, for examples with an input or output that is not finite."""

    @functools.wraps(estimator)
    def marked(*args: P.args, **kwargs: P.kwargs) -> R:
        found = estimator(*args, **kwargs)
        source = args[0] if args else kwargs["linearization"]
        if not isinstance(source, Linearization):
            return found
        finite = finite_examples(source)
        parts = found._asdict()  # type: ignore[attr-defined]
        for name in {"value", "sem", "residual", "converged", "points"} & set(parts):
            if parts[name] is not None:
                parts[name] = nan_unless(finite, parts[name])
        if isinstance(parts.get("vectors"), tuple):  # singular vectors, (k, B, …)
            parts["vectors"] = tree.map_structure(lambda v: nan_unless(finite, v, axis=1), parts["vectors"])
        elif parts.get("vectors") is not None:
            parts["vectors"] = nan_unless(finite, parts["vectors"])
        return type(found)(**parts)

    return marked


def as_operator(source: Linearization | Operator) -> Operator:
    """The Jacobian of a linearization as an operator; several inputs or outputs are one long vector each.

    Raises:
        ValueError: `source` is neither.
    """
    if isinstance(source, Operator):
        return source
    if not isinstance(source, Linearization):
        expected = "what `jvpreg.linearize` returns, or a `jvpreg.estimators.Operator`"
        raise checks.invalid("linearization", expected, source)
    inputs, outputs = spaces(source)
    # A decomposition of a matrix that holds a NaN fails for the whole batch.
    finite = ops.reshape(finite_examples(source), (1, -1, 1))

    def forward(vectors: Tensor) -> Tensor:
        directions = source.pack_inputs(tree.flatten(probes.split(vectors, inputs)))
        return ops.where(finite, flatten(source.jvp(directions)), 0.0)

    def backward(vectors: Tensor) -> Tensor:
        pulled = source.vjp(probes.split(vectors, outputs))
        return ops.where(finite, flatten(source.flatten_inputs(pulled)), 0.0)

    dtype = widest_dtype([*source.inputs, *tree.flatten(outputs)])
    shape = (probes.dimension(outputs), probes.dimension(inputs))
    return Operator(forward, backward, shape, ops.shape(source.inputs[0])[0], dtype)


def spaces(linearization: Linearization) -> tuple:
    """The inputs, one tensor or a flat list of several, and the outputs in the model's own structure."""
    inputs = linearization.inputs
    return inputs[0] if len(inputs) == 1 else inputs, linearization.outputs


def flatten(structure: Structure) -> Tensor:
    """Products `(P, B, …)` as one tensor `(P, B, n)`."""
    # The size is known even if the batch is not.
    leaves = [ops.reshape(leaf, (*ops.shape(leaf)[:2], math.prod(leaf.shape[2:]))) for leaf in tree.flatten(structure)]
    return leaves[0] if len(leaves) == 1 else ops.concatenate(leaves, axis=-1)


def magnitude(vectors: Tensor) -> Tensor:
    """The largest entry of each example in `(P, B, n)`, `(B,)`: a unit in which squares do not overflow."""
    largest = ops.max(ops.abs(vectors), axis=(0, 2))
    return ops.where(largest > 0, largest, 1.0)


def check_square(operator: Operator, name: str) -> None:
    """Raises if an estimate that needs a square operator is asked of one that is not square."""
    if not operator.is_square:
        raise ValueError(
            f"`{name}` is defined for a square Jacobian only: as many outputs as inputs. "
            f"Received: {operator.shape[0]} outputs and {operator.shape[1]} inputs."
        )
