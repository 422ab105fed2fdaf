"""What the whole Jacobian of each example says: all its singular values."""

import numpy as np
from keras import ops

from jvpreg.common import checks
from jvpreg.estimators.operator import Operator, as_operator, by_example
from jvpreg.estimators.result import Estimate, exact
from jvpreg.estimators.spectrum import materialized_triplets
from jvpreg.linearization import Linearization


@by_example
def singular_values(linearization: Linearization | Operator) -> Estimate:
    """All singular values of each example's Jacobian, which is materialized from its smaller side.

    Args:
        linearization: from `jvpreg.linearize`, or an `Operator`.

    Returns:
        An `Estimate`, each part `(B, min(m, n))`, the largest first. It costs `min(m, n)` products.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, kernel_initializer="ones")])
    >>> estimate = jvpreg.estimators.singular_values(jvpreg.linearize(model, np.zeros((1, 3))))
    >>> tuple(estimate.value.shape)
    (1, 2)
    """
    operator = as_operator(linearization).upright
    ritz, unit = materialized_triplets(operator, operator.shape[1])
    return exact(unit * ritz.values, operator.shape[1])


@by_example
def condition_number(linearization: Linearization | Operator, max_matvecs: int = 1024) -> Estimate:
    """`σ₁ / σ_min` of each example's Jacobian, over the singular values of its smaller side.

    Exact: the Jacobian is materialized, because a smaller number of products gives no lower bound of the smallest
    singular value.

    Args:
        linearization: from `jvpreg.linearize`, or an `Operator`.
        max_matvecs: the largest number of products that it may take.

    Returns:
        An `Estimate`, each part `(B,)`; infinite if the Jacobian does not have full rank. Rounding may turn a zero into
        a small number: beyond 1e6 in float32, 1e15 in float64, the result says only that it is large.

    Raises:
        ValueError: it would take more than `max_matvecs`.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, kernel_initializer="identity")])
    >>> estimate = jvpreg.estimators.condition_number(jvpreg.linearize(model, np.zeros((1, 3))))
    >>> float(keras.ops.convert_to_numpy(estimate.value)[0])
    1.0
    """
    checks.count("max_matvecs", max_matvecs)
    size = min(as_operator(linearization).shape)
    if size > max_matvecs:
        raise ValueError(
            f"The condition number takes {size} products, one for each dimension of the smaller side. Expected at most "
            f"`max_matvecs`. Received: max_matvecs={max_matvecs}"
        )
    estimate = singular_values(linearization)
    largest, smallest = estimate.value[:, 0], estimate.value[:, -1]
    value = ops.where(smallest > 0, largest / ops.where(smallest > 0, smallest, 1.0), np.inf)
    return exact(value, size)
