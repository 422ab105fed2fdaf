"""Directions that a reference can have too, in place of random ones."""

from typing import Any

from keras import ops

from jvpreg.regularizers import JacobianNorm

FREQUENCY = 20.0
FEEDBACK = 1e-3


def known_directions(like: Any, num_probes: int) -> Any:
    """Directions `(P, B, …)` that follow from `like` (B, …), so that they stay with an example in any batch."""
    like = ops.stop_gradient(ops.convert_to_tensor(like))
    return ops.stack([ops.cos(FREQUENCY * (1 + probe) * like) for probe in range(num_probes)])


def following(vector, image):
    """The vector `(B, …)` of the next of several products, which depends on the product before, `(B, …)`."""
    mean = ops.mean(ops.reshape(image, (ops.shape(image)[0], -1)), axis=1)
    moved = FEEDBACK * mean / (1 + ops.abs(mean))
    return vector + ops.reshape(moved, (-1, *[1] * (len(vector.shape) - 1)))


class KnownDirection:
    """One of the known directions, as a field that a constraint can be given."""

    num_directions = 1

    def __init__(self, probe: int):
        self.probe = probe

    def __call__(self, inputs):
        """The direction, `(1, B, …)`."""
        return known_directions(inputs, self.probe + 1)[self.probe :]


class KnownJacobianNorm(JacobianNorm):
    """The same penalty in the known directions."""

    def directions(self, inputs, labels, seed):
        """Of the input, if that is the side."""
        return known_directions(inputs, self.num_probes) if self.side == "input" else None

    def cotangents(self, outputs, labels, seed):
        """Of the output, if that is the side."""
        return known_directions(outputs, self.num_probes) if self.side == "output" else None
