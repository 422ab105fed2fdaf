"""Layers."""

from jvpreg.layers.fixed_point import FixedPoint
from jvpreg.layers.jacobian_penalty import JacobianPenalty

__all__ = ["FixedPoint", "JacobianPenalty"]
