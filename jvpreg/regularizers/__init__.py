"""Jacobian regularizers: directions in which to look at the Jacobian, and a penalty for what is seen."""

from jvpreg.regularizers.base import JacobianRegularizer, Seen
from jvpreg.regularizers.capabilities import Carries, Constrains, Looks, Scheduled, Searches
from jvpreg.regularizers.fixed_point import FixedPointJacobianNorm
from jvpreg.regularizers.full_jacobian import BiasJacobianNorm, FullJacobianNorm
from jvpreg.regularizers.gradient_penalty import GradientPenalty
from jvpreg.regularizers.jacobian import JacobianNorm
from jvpreg.regularizers.spectral import SpectralNorm

__all__ = [
    "BiasJacobianNorm",
    "Carries",
    "Constrains",
    "FixedPointJacobianNorm",
    "FullJacobianNorm",
    "GradientPenalty",
    "JacobianNorm",
    "JacobianRegularizer",
    "Looks",
    "Scheduled",
    "Searches",
    "Seen",
    "SpectralNorm",
]
