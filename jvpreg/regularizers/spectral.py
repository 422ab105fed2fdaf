"""A penalty on the largest singular value."""

import keras
from keras import ops, tree

from jvpreg import probes
from jvpreg.common import checks
from jvpreg.common.typing import Config, Structure, Tensor
from jvpreg.estimators.norms import squared_norm
from jvpreg.estimators.operator import flatten, spaces
from jvpreg.linearization import Linearization
from jvpreg.regularizers.base import JacobianRegularizer, Seen
from jvpreg.regularizers.capabilities import Searches

# With more outputs, a vector for each of them would be a large matrix.
MOST_CLASSES = 1024


@keras.saving.register_keras_serializable(package="jvpreg")
class SpectralNorm(Searches, JacobianRegularizer):
    """Penalizes `σ₁²`, the squared spectral norm of each example's Jacobian, by power iteration.

    An iteration is one product `u = Jᵀ v / ‖Jᵀ v‖` and one `J u`, whose squared length is the penalty: never more
    than `σ₁²`, and at the singular vector its gradient is that of `σ₁²` itself. `v` is carried from step to step. Each
    batch has other examples, but examples of one class have similar singular vectors: so there is one `v` for each
    output, and an example starts from that of its largest output. If the outputs are not `(B, K)`, all examples share
    one.

    Args:
        strength: the loss gains `strength × mean σ₁²`.
        num_iterations: in each step; one is enough if the singular vectors change slowly.
        name: of its metric; it logs `spectral_norm_squared`, the mean over the examples of the estimate of `σ₁²`.
        at: the path of a layer, such as an embedding: the Jacobian is then by what this layer returned, at the data.

    Raises:
        ValueError: an argument is out of its range.

    Reference: Yoshida & Miyato (2017), "Spectral norm regularization", section 3.3, for weights; here it is the
    Jacobian.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = jvpreg.JacobianModel(keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)]))
    >>> model.compile(loss="mse", jacobian_regularizers=[jvpreg.regularizers.SpectralNorm(0.01)])
    >>> history = model.fit(np.ones((32, 8)), np.zeros((32, 3)), verbose=0)
    >>> sorted(history.history)
    ['loss', 'spectral_norm_squared']
    """

    default_name = "spectral_norm_squared"

    def __init__(self, strength: float, num_iterations: int = 1, name: str | None = None, at: str | None = None):
        super().__init__(strength, name, at)
        self.num_iterations = checks.count("num_iterations", num_iterations)

    def carried_shape(self, outputs: Structure) -> tuple[int, ...] | None:
        """A vector like the outputs for each class: `(C, K)`, or `(1, K)`."""
        size = probes.dimension(outputs)
        return (size if _has_classes(outputs) else 1), size

    def search(self, linearization: Linearization, carried: Tensor) -> Tensor:
        """Approximate right singular vectors, `(1, B, …)`, of length 1."""
        inputs, outputs = spaces(linearization)

        def pulled(cotangent: Tensor) -> Tensor:
            product = linearization.vjp(probes.split(cotangent, outputs))
            return _normalized(flatten(linearization.flatten_inputs(product)))

        tangent = pulled(_started(outputs, carried))
        for _ in range(1, self.num_iterations):
            directions = linearization.pack_inputs(tree.flatten(probes.split(tangent, inputs)))
            tangent = pulled(_normalized(flatten(linearization.jvp(directions))))
        # The gradient is that of ‖J u‖² at this u.
        return probes.split(ops.stop_gradient(tangent), inputs)

    def sums_shape(self, carried_shape: tuple[int, ...]) -> tuple[int, ...]:
        """One column more than the vectors, for the number of examples."""
        classes, size = carried_shape
        return classes, size + 1

    def sums(self, seen: Seen, carried: Tensor) -> Tensor:
        """For each class the sum of its examples' new vectors, and their number: `(C, K + 1)`."""
        new = _normalized(flatten(tree.map_structure(ops.stop_gradient, seen.jvp)))
        new = ops.cast(new[0], carried.dtype)
        # The sign of a singular vector is arbitrary.
        same = ops.sum(new * _started(seen.outputs, carried)[0], axis=-1, keepdims=True) >= 0
        new = ops.where(same, new, -new)
        members = ops.transpose(_members(seen.outputs, carried))
        return ops.concatenate([ops.matmul(members, new), ops.sum(members, axis=1, keepdims=True)], axis=1)

    def carry(self, carried: Tensor, sums: Tensor) -> Tensor:
        """The mean of each class's vector and the mean of its examples' new vectors, normalized."""
        counts = sums[:, -1:]
        mean = sums[:, :-1] / ops.maximum(counts, 1.0)
        return ops.where(counts > 0, _normalized(_normalized(carried) + mean), carried)

    def penalty(self, seen: Seen) -> Tensor:
        """`‖J u‖²`: `(B,)`."""
        return squared_norm(seen.jvp)[0]

    def get_config(self) -> Config:
        """The arguments of `__init__`."""
        return {**super().get_config(), "num_iterations": self.num_iterations}


def _has_classes(outputs: Structure) -> bool:
    leaves = tree.flatten(outputs)
    return len(leaves) == 1 and len(leaves[0].shape) == 2 and leaves[0].shape[1] <= MOST_CLASSES


def _members(outputs: Structure, carried: Tensor) -> Tensor:
    """The class of each example, by its largest output: `(B, C)`, ones and zeros."""
    first = tree.flatten(outputs)[0]
    count = carried.shape[0]
    if count == 1:
        return ops.ones((ops.shape(first)[0], 1), carried.dtype)
    return ops.one_hot(ops.argmax(first, axis=-1), count, dtype=carried.dtype)


def _started(outputs: Structure, carried: Tensor) -> Tensor:
    """The vector from which each example starts, out of those that are carried: `(1, B, K)`."""
    vectors = ops.matmul(_members(outputs, carried), _normalized(carried))
    return ops.expand_dims(ops.stop_gradient(vectors), 0)


def _normalized(vectors: Tensor) -> Tensor:
    """Vectors of length 1; a zero vector stays zero, and NaN stays NaN."""
    length = ops.norm(vectors, axis=-1, keepdims=True)
    return vectors / ops.where(length == 0, 1.0, length)
