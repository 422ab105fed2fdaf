"""Estimators: from products with the Jacobian to an estimate with its error, for every example of a batch at once."""

from jvpreg.estimators.entries import diagonal, row_norms
from jvpreg.estimators.fixed_point import fixed_point_spectral_radius
from jvpreg.estimators.materialized import condition_number, singular_values
from jvpreg.estimators.norms import frobenius_norm
from jvpreg.estimators.operator import Operator
from jvpreg.estimators.quadrature import SpectralDensity, inverse_frobenius_norm, log_determinant, spectral_density
from jvpreg.estimators.ranks import effective_rank, schatten_norm, stable_rank
from jvpreg.estimators.result import Estimate
from jvpreg.estimators.spectrum import spectral_norm, top_eigenvalues, top_singular_values
from jvpreg.estimators.traces import trace

__all__ = [
    "Estimate",
    "Operator",
    "SpectralDensity",
    "condition_number",
    "diagonal",
    "effective_rank",
    "fixed_point_spectral_radius",
    "frobenius_norm",
    "inverse_frobenius_norm",
    "log_determinant",
    "row_norms",
    "schatten_norm",
    "singular_values",
    "spectral_density",
    "spectral_norm",
    "stable_rank",
    "top_eigenvalues",
    "top_singular_values",
    "trace",
]
