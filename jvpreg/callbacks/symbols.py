"""How the metrics of a `JacobianProbe` are written for a reader: in a terminal, and on the axes of a picture."""

import re
from typing import NamedTuple


class Symbol(NamedTuple):
    """Of a metric: as text, and as TeX for matplotlib."""

    text: str
    tex: str


# A metric that is not here is written as its name in the logs.
SYMBOLS = {
    "condition_number": Symbol("σ₁/σₘᵢₙ", r"$\sigma_1 / \sigma_{\min}$"),
    "diagonal": Symbol("Jᵢᵢ", r"$J_{ii}$"),
    "effective_rank": Symbol("effective rank", "effective rank"),
    "fixed_point_spectral_radius": Symbol("ρ(∂f/∂z)", r"$\rho(\partial f / \partial z)$"),
    "frobenius_norm": Symbol("‖J‖", r"$\Vert J\Vert_F$"),
    "inverse_frobenius_norm": Symbol("‖J⁻¹‖", r"$\Vert J^{-1}\Vert_F$"),
    "log_determinant": Symbol("log det(I + JJᵀ)", r"$\log\,\det(I + J J^\top)$"),
    "row_norms": Symbol("‖Jᵢ‖", r"$\Vert J_i\Vert$"),
    "schatten_norm": Symbol("‖J‖ₚ", r"$\Vert J\Vert_p$"),
    "singular_values": Symbol("σ", r"$\sigma$"),
    "spectral_norm": Symbol("σ₁", r"$\sigma_1$"),
    "stable_rank": Symbol("‖J‖²/σ₁²", r"$\Vert J\Vert_F^2 / \sigma_1^2$"),
    "top_eigenvalues": Symbol("λ", r"$\lambda$"),
    "top_singular_values": Symbol("σ", r"$\sigma$"),
    "trace": Symbol("tr J", r"$\mathrm{tr}\,J$"),
}
ONE_OF_SEVERAL = re.compile(r"(singular_values|top_singular_values|top_eigenvalues)_(\d+)")
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def symbol(name: str) -> Symbol:
    """The symbol of a metric, or of one of several values, by a name such as `top_singular_values_2`."""
    if match := ONE_OF_SEVERAL.fullmatch(name):
        text, tex = SYMBOLS[match[1]]
        return Symbol(text + match[2].translate(SUBSCRIPTS), rf"{tex[:-1]}_{{{match[2]}}}$")
    return SYMBOLS.get(name, Symbol(name, name))
