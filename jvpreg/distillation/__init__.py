"""Distillation: matching losses between a teacher's and a student's outputs, Jacobians and feature maps."""

from jvpreg.distillation.activation import ActivationMatching
from jvpreg.distillation.attention import AttentionMatching
from jvpreg.distillation.base import MatchingLoss, View
from jvpreg.distillation.distiller import JacobianDistiller
from jvpreg.distillation.jacobian import BiasJacobianMatching, JacobianMatching

__all__ = [
    "ActivationMatching",
    "AttentionMatching",
    "BiasJacobianMatching",
    "JacobianDistiller",
    "JacobianMatching",
    "MatchingLoss",
    "View",
]
