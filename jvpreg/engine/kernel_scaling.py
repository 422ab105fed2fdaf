"""Folds the slopes of batch normalizations into the kernels before them."""

import math
from dataclasses import replace

from jvpreg.engine.node import Node
from jvpreg.rules.contract import Affine, ChannelScale

USUAL_BATCH = 32
"""The size to assume for a batch of unknown size: Keras' own default."""


def with_scaled_kernel(node: Node, scaling: Node, leading: tuple) -> tuple[Node, Node]:
    """The node with the slope of `scaling` in its kernels, and `scaling` as a node that passes its input on.

    Both are returned as they are if they cannot be changed so, or if the kernels have more numbers than the tangents
    between the two. What is saved is a pass over the tangents, and two over them in the gradient.
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
