"""Singular values and eigenvalues, against dense ones of explicit matrices and networks."""

import keras
import numpy as np
import pytest
from compare import assert_close, normal, numpy, randomize
from keras import layers, ops, tree
from matrices import estimated, numbers, operator, with_eigenvalues, with_singular_values

import jvpreg
from jvpreg.estimators import condition_number, singular_values, spectral_norm, top_eigenvalues, top_singular_values

ROWS, COLUMNS = 40, 32
SINGULAR = {
    "random": normal(ROWS, COLUMNS),
    "decaying": with_singular_values(0.7 ** np.arange(COLUMNS), ROWS, COLUMNS),
    "repeated": with_singular_values([3, 3, 3, *np.linspace(0.1, 1, 20)], ROWS, COLUMNS),
    "repeated more often than k": with_singular_values([3] * 5 + [1] * 5, ROWS, COLUMNS),
    "clustered": with_singular_values([3, 3 - 1e-7, 3 - 2e-7, *np.linspace(0.5, 2, 20)], ROWS, COLUMNS),
    "orthogonal": with_singular_values(np.ones(COLUMNS), ROWS, COLUMNS),
    "rank one": with_singular_values([2.0], ROWS, COLUMNS),
    "rank two": with_singular_values([2.0, 1e-3], ROWS, COLUMNS),
    "zero": np.zeros((ROWS, COLUMNS)),
    "huge": 1e8 * with_singular_values([3, 2, 1, 0.5], ROWS, COLUMNS),
    "tiny": 1e-8 * with_singular_values([3, 2, 1, 0.5], ROWS, COLUMNS),
    "wide range": with_singular_values(10.0 ** -np.arange(12), ROWS, COLUMNS),
}
SLOW = with_singular_values(0.9999 ** np.arange(COLUMNS), ROWS, COLUMNS)
JORDAN = 2 * np.eye(36) + np.eye(36, k=1)
SMALL_JORDAN = np.pad(2 * np.eye(3) + np.eye(3, k=1), (0, 33))
EIGEN = {
    "random": normal(36, 36),
    "decaying": with_eigenvalues(0.7 ** np.arange(36), 36),
    "negative": with_eigenvalues([-3, 2, -1], 36),
    "complex pairs": with_eigenvalues([3 + 1j, 2 + 1j, 1 + 1j, *([0.5] * 20)], 36),
    "repeated": with_eigenvalues([3, 3, 3, 1, 0.5], 36),
    "repeated pairs": with_eigenvalues([3j, 3j, 1, 0.5], 36),
    "plus and minus": with_eigenvalues([3, -3, 1, 0.5], 36),
    "identity": np.eye(36),
    "zero": np.zeros((36, 36)),
    "rank one": with_eigenvalues([2.0], 36),
    "huge": 1e8 * with_eigenvalues([3 + 1j, 1], 36),
    "tiny": 1e-8 * with_eigenvalues([3 + 1j, 1], 36),
    "far from normal": np.triu(normal(36, 36, seed=1), 1) / 10 + np.diag(2.0 ** -np.arange(36)),
}


def check_singular(matrices, estimate, names, rounding, tolerance):
    """Check every promise for each example; tolerances are relative to σ₁."""
    k = estimate.value.shape[1]
    left, right = (vectors.transpose(1, 0, 2) for vectors in estimate.vectors)
    assert estimate.value.shape == estimate.sem.shape == estimate.residual.shape == estimate.converged.shape
    assert not estimate.sem.any()
    for b, name in enumerate(names):
        exact = np.linalg.svd(matrices[b].astype("float64"), compute_uv=False)
        scale = exact[0] if exact[0] > 0 else 1.0
        value, residual, converged = (part[b] for part in (estimate.value, estimate.residual, estimate.converged))
        assert np.all(np.diff(value) <= rounding * scale), name
        assert np.all(value <= exact[:k] + rounding * scale), f"{name}: no lower bounds"
        nearest = np.abs(value[:, None] - exact).min(axis=1)
        assert np.all(nearest <= residual + rounding * scale), f"{name}: the residual is no bound"
        assert np.all(np.abs(value - exact[:k])[converged] <= tolerance * scale), f"{name}: wrong"
        for rows in (left[b], right[b]):
            np.testing.assert_allclose(rows @ rows.T, np.eye(k), atol=100 * rounding, err_msg=name)
        # Of A v = σ u and Aᵀ u = σ v one holds to rounding, and the other to ρ / σ; the residual may be √ρ.
        residual = np.maximum(residual, residual**2 / np.maximum(value, 1e-30))
        off = np.linalg.norm(right[b] @ matrices[b].T - value[:, None] * left[b], axis=1)
        assert np.all(off <= residual + 10 * rounding * scale), name
        off = np.linalg.norm(left[b] @ matrices[b] - value[:, None] * right[b], axis=1)
        assert np.all(off <= residual + 10 * rounding * scale), name


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shape", ["tall", "wide"])
@pytest.mark.parametrize("num_iterations", [3, 20], ids=["iterated", "materialized"])
def test_singular_values_of_all_kinds_in_one_batch(num_iterations, shape):
    matrices = np.stack(list(SINGULAR.values()))
    if shape == "wide":
        matrices = matrices.transpose(0, 2, 1).copy()
    found = estimated(
        top_singular_values, matrices, k=4, tolerance=1e-7, num_iterations=num_iterations, max_restarts=100
    )
    assert found.converged.all()
    check_singular(matrices, found, SINGULAR, rounding=1e-13, tolerance=1e-6)
    if num_iterations == 20:
        assert found.num_matvecs == COLUMNS
    else:
        # One product for the scale, and two for each vector of a space.
        assert (found.num_matvecs - 1) % (2 * 4) == 0
        assert found.num_matvecs > 1 + 2 * 4 * num_iterations


@pytest.mark.usefixtures("float64")
def test_vectors_of_repeated_values_belong_together():
    """TensorFlow's SVD may pair them wrongly by 1e-8. Rounding decides for which matrices, so here are many."""
    values = [3, 3, 3, *np.linspace(0.1, 1, 20)]
    matrices = np.stack([with_singular_values(values, ROWS, COLUMNS, seed=2 * seed) for seed in range(300)])
    found = estimated(top_singular_values, matrices, k=4, tolerance=1e-7, num_iterations=20)
    check_singular(matrices, found, range(300), rounding=1e-13, tolerance=1e-6)


@pytest.mark.parametrize("num_iterations", [3, 20], ids=["iterated", "materialized"])
def test_singular_values_in_float32(num_iterations):
    cases = {**SINGULAR, "1e20": 1e20 * SINGULAR["random"], "1e-20": 1e-20 * SINGULAR["random"]}
    matrices = np.stack(list(cases.values())).astype("float32")
    found = estimated(top_singular_values, matrices, k=4, num_iterations=num_iterations, max_restarts=30)
    assert found.converged.all()
    # The error is of the order of the residual's square, and so of the tolerance's, unless values are clustered.
    check_singular(matrices, found, cases, rounding=3e-6, tolerance=1e-3)
    for name in ("1e20", "1e-20", "huge", "tiny"):
        b = list(cases).index(name)
        exact = np.linalg.svd(matrices[b].astype("float64"), compute_uv=False)
        np.testing.assert_allclose(found.value[b], exact[:4], rtol=2e-3)
        assert np.all(found.residual[b] <= 1e-3 * exact[0] * 1.01)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("num_iterations", "max_restarts"), [(1, 0), (2, 0), (3, 1), (4, 3)])
def test_before_convergence_the_residual_is_honest(num_iterations, max_restarts):
    matrices = np.stack([SINGULAR["random"], SLOW, SINGULAR["decaying"]] * 5)
    found = estimated(
        top_singular_values, matrices, k=2, tolerance=1e-9, num_iterations=num_iterations, max_restarts=max_restarts
    )
    assert not found.converged[0::3].all()
    assert not found.converged[1::3].all()
    assert found.num_matvecs == 1 + 4 * num_iterations * (max_restarts + 1)
    assert np.all(found.converged == (found.residual <= 1e-9 * found.value[:, :1]))
    check_singular(matrices, found, ["random", "slow", "decaying"] * 5, rounding=1e-13, tolerance=1e-6)
    # The starting vectors differ between examples.
    assert np.ptp(found.value[1::3, 0]) > 1e-12


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (4, 6), (6, 4), (6, 6)])
def test_as_many_as_there_are(shape):
    matrices = normal(3, *shape)
    matrices[2, 1:] = 0
    found = estimated(top_singular_values, matrices, k=min(shape), tolerance=1e-9, num_iterations=1)
    check_singular(matrices, found, "abc", rounding=1e-13, tolerance=1e-9)
    assert found.num_matvecs == min(shape)
    every = estimated(singular_values, matrices)
    np.testing.assert_allclose(every.value, np.linalg.svd(matrices, compute_uv=False), atol=1e-13)
    assert every.converged is None
    assert not every.residual.any()


@pytest.mark.usefixtures("float64")
def test_the_spectral_norm_is_the_first_of_them():
    matrices = np.stack(list(SINGULAR.values()))
    norm, first = (estimated(f, matrices, num_iterations=5) for f in (spectral_norm, top_singular_values))
    for one, other in zip(norm[:4], first[:4], strict=True):
        np.testing.assert_array_equal(one, other[:, 0])
    assert norm.vectors is None


@pytest.mark.usefixtures("float64")
def test_the_condition_number():
    matrices = np.stack([normal(6, 4), with_singular_values([4, 3, 2, 1], 6, 4), 1e-9 * normal(6, 4), np.zeros((6, 4))])
    matrices = np.concatenate([matrices, np.diag([1.0, 2.0, 3.0, 0.0, 0.0, 0.0])[None, :, :4]])
    for given in (matrices, matrices.transpose(0, 2, 1).copy()):
        found = estimated(condition_number, given)
        np.testing.assert_allclose(found.value[:3], np.linalg.cond(matrices[:3]), rtol=1e-10)
        assert np.all(found.value[3:] == np.inf)
        assert found.num_matvecs == 4
    with pytest.raises(ValueError, match=r"takes 4 products.*`max_matvecs`. Received: max_matvecs=3"):
        condition_number(operator(matrices), max_matvecs=3)


def largest(values, k):
    return np.array(sorted(values, key=lambda value: -abs(value) * (1 + 1e-6 * np.sign(value.imag))))[:k]


def check_eigenvalues(matrices, estimate, names, rounding, tolerance, wrong=()):
    k = estimate.value.shape[1]
    for b, name in enumerate(names):
        exact = np.linalg.eigvals(matrices[b].astype("float64"))
        scale = np.abs(exact).max() or 1.0
        value, vectors, residual = estimate.value[b], estimate.vectors[b], estimate.residual[b]
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e3 * rounding, err_msg=name)
        own = np.linalg.norm(vectors @ matrices[b].T - value[:, None] * vectors, axis=1)
        size = np.linalg.norm(matrices[b], 2)
        np.testing.assert_allclose(own, residual, atol=100 * rounding * size, err_msg=name)
        assert np.all(np.diff(np.abs(value)) <= 2e-6 * scale), name
        if name in wrong:
            continue
        assert estimate.converged[b].all(), name
        # Compare sizes, since the order of values of one size is arbitrary. Each value must also be an eigenvalue.
        sizes = np.abs(largest(exact, k))
        np.testing.assert_allclose(np.abs(value), sizes, atol=tolerance * scale, err_msg=name)
        distance = np.abs(value[:, None] - exact).min(axis=1)
        assert np.all(distance <= tolerance * scale), name


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_iterations", [6, 20], ids=["iterated", "materialized"])
def test_eigenvalues_of_all_kinds_in_one_batch(num_iterations):
    matrices = np.stack(list(EIGEN.values()))
    found = estimated(top_eigenvalues, matrices, k=3, tolerance=1e-9, num_iterations=num_iterations, max_restarts=60)
    assert found.value.dtype == "complex128"
    check_eigenvalues(matrices, found, EIGEN, rounding=1e-13, tolerance=1e-6)
    pair = found.value[list(EIGEN).index("complex pairs")]
    np.testing.assert_allclose(pair, [3 + 1j, 3 - 1j, 2 + 1j], atol=1e-6)


@pytest.mark.parametrize("num_iterations", [6, 20], ids=["iterated", "materialized"])
def test_eigenvalues_in_float32(num_iterations):
    cases = {**EIGEN, "1e20": 1e20 * EIGEN["complex pairs"], "1e-20": 1e-20 * EIGEN["complex pairs"]}
    matrices = np.stack(list(cases.values())).astype("float32")
    found = estimated(top_eigenvalues, matrices, k=2, num_iterations=num_iterations, max_restarts=20)
    assert found.value.dtype == "complex64"
    # If a matrix is far from normal, an eigenvalue may be off by many times the residual.
    check_eigenvalues(matrices, found, cases, rounding=1e-6, tolerance=2e-3, wrong=("far from normal",))
    for name, scale in (("1e20", 1e20), ("1e-20", 1e-20)):
        value = found.value[list(cases).index(name)]
        np.testing.assert_allclose(value / scale, [3 + 1j, 3 - 1j], rtol=2e-3)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_iterations", [5, 20], ids=["iterated", "materialized"])
def test_defective_matrices(num_iterations):
    """Rounding moves their eigenvalues by its n-th root: a block of 36 loses all digits, but the residual is right."""
    matrices = np.stack([JORDAN, np.eye(36, k=1), SMALL_JORDAN])
    found = estimated(top_eigenvalues, matrices, k=2, tolerance=1e-9, num_iterations=num_iterations)
    names = ("jordan", "nilpotent", "small jordan")
    check_eigenvalues(matrices, found, names, rounding=1e-13, tolerance=0, wrong=names)
    np.testing.assert_allclose(found.value[2], [2, 2], atol=1e-3)
    assert found.converged[2].all()
    if num_iterations == 5:
        assert not found.converged[:2].any()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_all_eigenvalues(size):
    matrices = normal(4, size, size, seed=size)
    found = estimated(top_eigenvalues, matrices, k=size, num_iterations=1, tolerance=1e-9)
    check_eigenvalues(matrices, found, "abcd", rounding=1e-13, tolerance=1e-9)
    assert found.num_matvecs == size
    np.testing.assert_allclose(found.value.sum(axis=1), np.trace(matrices, axis1=1, axis2=2), atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_iterations", [8, 40], ids=["iterated", "materialized"])
@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_eigenvalues_of_what_is_not_square_are_squares(shape, num_iterations):
    matrices = np.stack(list(SINGULAR.values()))
    exact = np.linalg.svd(matrices, compute_uv=False)[:, :3] ** 2
    if shape == "wide":
        matrices = matrices.transpose(0, 2, 1).copy()
    found = estimated(top_eigenvalues, matrices, k=3, tolerance=1e-7, num_iterations=num_iterations, max_restarts=60)
    scale = np.maximum(exact[:, :1], 1e-30)
    assert found.converged.all()
    assert np.all(np.abs(found.value - exact) <= 1e-6 * scale)


def tanh_network():
    return keras.Sequential([keras.Input((20,)), layers.Dense(24, activation="tanh"), layers.Dense(20)])


def relu_network():
    return keras.Sequential([keras.Input((20,)), layers.Dense(24, activation="relu"), layers.Dense(22)])


def convolution():
    return keras.Sequential(
        [
            keras.Input((4, 4, 2)),
            layers.Conv2D(3, 3, padding="same", activation="tanh"),
            layers.MaxPooling2D(2),
            layers.Conv2D(5, 2, padding="same"),
        ]
    )


def several():
    a, b = keras.Input((3, 4)), keras.Input((9,))
    joined = layers.Concatenate()([layers.Flatten()(a), b])
    hidden = layers.Dense(24, activation="tanh")(joined)
    return keras.Model([a, b], {"one": layers.Dense(12)(hidden), "two": layers.Reshape((2, 6))(layers.Dense(12)(b))})


NETWORKS = [tanh_network, relu_network, convolution, several]


def linearized(network, batch_size=3):
    model = randomize(network())
    inputs = [normal(batch_size, *tensor.shape[1:], seed=i) for i, tensor in enumerate(model.inputs)]
    return jvpreg.linearize(model, inputs if len(inputs) > 1 else inputs[0])


def explicit(lin):
    """Each example's Jacobian, by rows of pullbacks."""
    sizes = [int(np.prod(output.shape[1:])) for output in tree.flatten(lin.outputs)]
    rows = []
    for i in range(sum(sizes)):
        unit = np.split(np.eye(sum(sizes))[i], np.cumsum(sizes)[:-1])
        cotangents = [
            ops.broadcast_to(ops.reshape(ops.convert_to_tensor(part), (1, *output.shape[1:])), output.shape)
            for part, output in zip(unit, tree.flatten(lin.outputs), strict=True)
        ]
        pulled = tree.flatten(lin.vjp(tree.pack_sequence_as(lin.outputs, cotangents)))
        rows.append(np.concatenate([numpy(part).reshape(len(part), -1) for part in pulled], axis=1))
    return np.stack(rows, axis=1)


@pytest.mark.usefixtures("float64")
@pytest.mark.skipif(keras.backend.backend() == "jax", reason="op by op, JAX compiles for minutes")
@pytest.mark.parametrize("num_iterations", [4, 40], ids=["iterated", "materialized"])
@pytest.mark.parametrize("network", NETWORKS)
def test_networks(network, num_iterations):
    lin = linearized(network)
    matrices = explicit(lin)
    exact = np.linalg.svd(matrices, compute_uv=False)
    found = top_singular_values(lin, k=2, tolerance=1e-7, num_iterations=num_iterations, max_restarts=50)
    value = numpy(found.value)
    np.testing.assert_allclose(value, exact[:, :2], atol=1e-6 * exact.max())
    assert numpy(found.converged).all()
    np.testing.assert_allclose(numpy(singular_values(lin).value), exact, atol=1e-12)
    # The vectors are structures that the linearization takes and gives.
    left, right = found.vectors
    weighted = tree.map_structure(lambda u: numpy(u) * value.T.reshape(2, len(value), *[1] * (len(u.shape) - 2)), left)
    assert_close(lin.jvp(right), weighted, 1e-5)
    tree.assert_same_structure(left, lin.outputs)


@pytest.mark.usefixtures("float64")
@pytest.mark.skipif(keras.backend.backend() == "jax", reason="op by op, JAX compiles for minutes")
def test_eigenvalues_of_a_network():
    lin = linearized(tanh_network)
    matrices = explicit(lin)
    exact = np.linalg.eigvals(matrices)
    assert np.abs(exact.imag).max() > 0.1
    for num_iterations in (5, 20):
        found = numbers(top_eigenvalues(lin, k=1, tolerance=1e-9, num_iterations=num_iterations, max_restarts=50))
        expected = [largest(values, 1) for values in exact]
        np.testing.assert_allclose(found[0], expected, atol=1e-6)


@pytest.mark.parametrize("estimator", [top_singular_values, top_eigenvalues])
@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("k", 0, r"`k`. Expected an integer from 1 to 3. Received: k=0"),
        ("k", 1.5, r"`k`. Expected an integer"),
        ("k", True, r"`k`. Expected an integer"),
        ("k", 4, r"`k`. Expected an integer from 1 to 3. Received: k=4"),
        ("tolerance", 0, r"`tolerance`. Expected a finite number above 0. Received: tolerance=0"),
        ("tolerance", float("nan"), r"`tolerance`. Expected a finite number above 0. Received: tolerance=nan"),
        ("tolerance", "small", r"`tolerance`. Expected a finite number above 0. Received: tolerance='small'"),
        ("num_iterations", 0, r"`num_iterations`. Expected an integer, 1 or more. Received: num_iterations=0"),
        ("max_restarts", -1, r"`max_restarts`. Expected an integer, 0 or more. Received: max_restarts=-1"),
    ],
)
def test_bad_arguments(estimator, argument, value, message):
    with pytest.raises(ValueError, match=message):
        estimator(operator(np.eye(3)), **{argument: value})
