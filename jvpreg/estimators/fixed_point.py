"""The spectral radius of a fixed-point layer's cell: of its Jacobian with respect to its state."""

from typing import Any

from keras import ops

from jvpreg import probes
from jvpreg.common import checks
from jvpreg.common.typing import Seed, Tensor
from jvpreg.engine.finite import finite_examples
from jvpreg.engine.paths import is_within
from jvpreg.estimators.operator import Operator, by_example
from jvpreg.estimators.result import Estimate
from jvpreg.estimators.spectrum import top_eigenvalues
from jvpreg.fixed_points.derivatives import ImplicitPushforward
from jvpreg.linearization import Linearization


@by_example
def fixed_point_spectral_radius(
    linearization: Linearization,
    layer: str | None = None,
    tolerance: float = 1e-2,
    num_iterations: int = 20,
    seed: Seed = 0,
) -> Estimate:
    """The spectral radius of `∂_z f` at the fixed point of a `FixedPoint` layer's cell.

    Below 1, plain iteration converges from nearby; in the end each step shortens the error by this factor.

    Args:
        linearization: from `jvpreg.linearize`, of a model that holds the layer.
        layer: its path, as the linearization's nodes have it; by default the only one.
        tolerance: as in `top_eigenvalues`.
        num_iterations: as in `top_eigenvalues`.
        seed: as in `top_eigenvalues`.

    Returns:
        An `Estimate`, each part `(B,)`: the magnitude of the largest eigenvalue, as `top_eigenvalues` finds it.

    Raises:
        ValueError: there is no such layer.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> x, z = keras.Input((2,)), keras.Input((2,))
    >>> model = keras.Sequential([keras.Input((2,)), jvpreg.layers.FixedPoint(keras.Model([x, z], x - 0.5 * z))])
    >>> estimate = jvpreg.estimators.fixed_point_spectral_radius(jvpreg.linearize(model, np.ones((1, 2))))
    >>> keras.ops.convert_to_numpy(estimate.value).round(4).tolist()
    [0.5]
    """
    pushforward = frozen_fixed_point(linearization, layer)
    z = pushforward.residuals[0]
    size, batch = probes.dimension(z), ops.shape(z)[0]
    finite = ops.reshape(finite_examples(linearization), (1, -1, 1))

    def matvec(vectors: Tensor) -> Tensor:
        count = ops.shape(vectors)[0]
        tangents = ops.reshape(ops.cast(vectors, z.dtype), (count, batch, *z.shape[1:]))
        return ops.where(finite, ops.reshape(pushforward.state_product(tangents), (count, batch, size)), 0.0)

    found = top_eigenvalues(Operator(matvec, None, (size, size), batch), 1, tolerance, num_iterations, seed=seed)
    value, sem, residual, converged = (part[:, 0] for part in found[:4])
    return Estimate(ops.abs(value), sem, residual, converged, found.num_matvecs)


def frozen_fixed_point(linearization: Linearization, layer: str | None) -> ImplicitPushforward:
    """A fixed-point layer as a linearization has it frozen; the first of its residuals is z.

    Raises:
        ValueError: there is no such layer, or there are several and none was named.
    """
    if not isinstance(linearization, Linearization):
        raise checks.invalid("linearization", "what `jvpreg.linearize` returns", linearization)
    checks.text("layer", layer, optional=True)
    solved = [node for node in linearization.nodes if isinstance(node.pushforward, ImplicitPushforward)]
    known = [node.name for node in solved]
    named = [node for node in solved if layer is None or is_within(node.name, layer) or is_within(node.path, layer)]
    found: list[Any] = [node.pushforward for node in named]
    if len(found) != 1:
        expected = f"the path of a FixedPoint layer of the model, one of {known}, or None if there is only one"
        raise checks.invalid("layer", expected, layer)
    return found[0]
