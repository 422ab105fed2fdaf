"""The slopes of batch normalizations, taken up by the kernels before them."""

import math
from dataclasses import replace

from jvpreg.engine.node import Node
from jvpreg.rules.contract import Affine, ChannelScale

USUAL_BATCH = 32
"""Keras' own default, for a batch of a size that is not known."""


def with_scaled_kernel(node: Node, scaling: Node, leading: tuple) -> tuple[Node, Node]:
    """A node with the channels of its output multiplied as a second one does, and the second one, which passes them on.

    Where the kernels have fewer numbers than the tangents between the two: else, and where it cannot be done, as they
    are. What it saves is a pass over the tangents, and two over them in the gradient.
    """
    linear, slope, (value,) = node.pushforward, scaling.pushforward, node.outputs
    assert isinstance(linear, Affine)
    assert isinstance(slope, ChannelScale)
    probes, batch = leading[0], value.primal.shape[0] if leading[1] is None else leading[1]
    known = [size for size in (probes, batch, *value.primal.shape[1:]) if isinstance(size, int)]
    numbers = math.prod(known) * (1 if isinstance(batch, int) else USUAL_BATCH)
    kernels = sum(math.prod(variable.shape) for variable in linear.variables)
    # Under mixed precision the slope is of float32, and would be rounded before it is used.
    pays = kernels <= numbers and slope.slope.dtype == value.primal.dtype
    scaled = linear.with_channels_scaled(slope.slope, slope.axis) if pays else None
    if scaled is None:
        return node, scaling
    passed = slope.with_function(lambda tangent, *residuals: tangent)
    return replace(node, pushforward=scaled), replace(scaling, pushforward=passed)
