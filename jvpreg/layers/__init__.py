"""Layers."""

from jvpreg.layers.jacobian_penalty import JacobianPenalty

__all__ = ["JacobianPenalty"]
