"""Estimators: products with the Jacobian in, one number an example out, with its error."""

from jvpreg.estimators.norms import frobenius_norm
from jvpreg.estimators.result import Estimate
from jvpreg.estimators.spectrum import top_singular_value

__all__ = ["Estimate", "frobenius_norm", "top_singular_value"]
