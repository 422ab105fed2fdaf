"""Operators, and every estimator on them: in parts, compiled, on a batch of unknown size, in mixed precision."""

import typing
from functools import partial

import keras
import numpy as np
import pytest
from compare import normal, randomize
from keras import layers, ops, tree
from matrices import numbers, operator, with_eigenvalues

import jvpreg
from jvpreg import estimators
from jvpreg.estimators import Operator
from jvpreg.testing import compiled

BACKEND = keras.backend.backend()
SIZE = 20
# Each estimator has options so small that a network of 20 inputs is not materialized; some also have a row that is.
ESTIMATORS = {
    "frobenius_norm": partial(estimators.frobenius_norm, num_probes=4),
    "exact frobenius_norm": partial(estimators.frobenius_norm, num_probes=SIZE),
    "frobenius_norm by Nyström": partial(estimators.frobenius_norm, num_probes=8, method="xnystrace"),
    "diagonal": partial(estimators.diagonal, num_matvecs=6),
    "row_norms": partial(estimators.row_norms, num_probes=4),
    "exact row_norms": partial(estimators.row_norms, num_probes=SIZE),
    "top_singular_values": partial(estimators.top_singular_values, k=2, num_iterations=3, tolerance=1e-4),
    "singular_values": estimators.singular_values,
    "spectral_norm": partial(estimators.spectral_norm, num_iterations=5),
    "condition_number": estimators.condition_number,
    "top_eigenvalues": partial(estimators.top_eigenvalues, num_iterations=4),
    "hutchinson": partial(estimators.trace, num_matvecs=6, method="hutchinson"),
    "hutch++": partial(estimators.trace, num_matvecs=6, method="hutch++"),
    "xtrace": partial(estimators.trace, num_matvecs=6, method="xtrace"),
    "exact trace": estimators.trace,
    "log_determinant": partial(estimators.log_determinant, num_probes=2, num_iterations=4),
    "log_determinant of J": partial(estimators.log_determinant, of="J", num_probes=2, num_iterations=4),
    "exact log_determinant of J": partial(estimators.log_determinant, of="J"),
    "log_determinant without a shift": partial(estimators.log_determinant, shift=0, num_probes=2, num_iterations=4),
    "inverse_frobenius_norm": partial(estimators.inverse_frobenius_norm, num_probes=2, num_iterations=4),
    "stable_rank": partial(estimators.stable_rank, num_probes=4, num_iterations=5),
    "effective_rank": partial(estimators.effective_rank, num_probes=2, num_iterations=4),
    "schatten_norm": partial(estimators.schatten_norm, num_probes=2, num_iterations=4),
    "spectral_density": partial(estimators.spectral_density, num_points=8, num_probes=2, num_iterations=4),
}
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)
# Compiling takes seconds for each, so not all are compiled. These use every kind of loop and decomposition.
COMPILED = [
    "top_singular_values",
    "xtrace",
    "log_determinant",
    "exact log_determinant of J",
    *(["top_eigenvalues"] if BACKEND == "jax" else []),  # TensorFlow has no general eigenvalues under XLA.
]


def test_every_estimator_has_a_row():
    """Except estimators that take only a linearization, and no operator."""
    given = {name: getattr(estimators, name) for name in estimators.__all__ if name.islower()}
    kinds = {name: typing.get_type_hints(estimator)["linearization"] for name, estimator in given.items()}
    known = [getattr(row, "func", row) for row in ESTIMATORS.values()]
    missing = [name for name in given if Operator in typing.get_args(kinds[name]) and given[name] not in known]
    assert not missing, f"without a row in ESTIMATORS: {missing}"


DECOMPOSITIONS = {"cholesky", "eig", "eigh", "geqp3", "geqrf", "householder_product", "lu", "qr", "schur", "svd"}


def programs(eqn):
    """The programs within an operation of a program of JAX: the body of a loop, a function that is jitted."""
    found = (getattr(parameter, "jaxpr", parameter) for parameter in tree.flatten(list(eqn.params.values())))
    return [parameter for parameter in found if hasattr(parameter, "eqns")]


def decomposes(eqn):
    return eqn.primitive.name in DECOMPOSITIONS or any(decomposes(e) for part in programs(eqn) for e in part.eqns)


def side_by_side(program):
    """How many pairs of decompositions there are of which neither waits for the result of the other."""
    count, before, awaited = 0, set(), {}
    for eqn in program.eqns:
        waits_for = set().union(*(awaited.get(id(variable), ()) for variable in eqn.invars))
        if decomposes(eqn):
            count += len(before - waits_for) + sum(map(side_by_side, programs(eqn)))
            before.add(id(eqn))
            waits_for.add(id(eqn))
        awaited.update((id(variable), waits_for) for variable in eqn.outvars)
    return count


@pytest.mark.skipif(BACKEND != "jax", reason="other backends decompose one batch after the other")
@every_estimator
def test_decompositions_wait_for_each_other(name):
    """On a CPU, JAX' decompositions of two batches can wait for each other's threads, and then they wait forever."""
    import jax

    model, x = network(), normal(2, SIZE).astype("float32")

    def estimate(x):
        return [part for part in ESTIMATORS[name](jvpreg.linearize(model, x)) if part is not None]

    assert side_by_side(jax.make_jaxpr(estimate)(x).jaxpr) == 0
    two = jax.make_jaxpr(lambda x: (jax.numpy.linalg.qr(x), jax.numpy.linalg.qr(x + 1.0)))
    assert side_by_side(two(np.eye(3)).jaxpr) == 1


def network():
    """Close to the identity, so that what needs a positive spectrum has one."""
    x = keras.Input((SIZE,))
    return keras.Model(x, layers.Add()([x, 0.1 * layers.Dense(SIZE)(layers.Dense(24, activation="tanh")(x))]))


def values(estimate):
    """Everything but the vectors, whose signs and phases are arbitrary."""
    return [part for part in numbers(estimate)[:5] if part is not None]


def assert_same(received, expected, rtol):
    assert len(received) == len(expected) >= 4
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * max(np.abs(other).max(), 1e-2))


def recorded(matrix, **kwargs):
    """An operator, and how many vectors went through each of its products."""
    counts = []

    def counted(equation):
        def product(vectors):
            counts.append(vectors.shape[0])
            return ops.einsum(equation, ops.convert_to_tensor(matrix), vectors)

        return product

    return counts, Operator(
        counted("mn,pbn->pbm"), counted("mn,pbm->pbn"), matrix.shape, batch_size=2, dtype="float64", **kwargs
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.skipif(BACKEND == "jax", reason="op by op, JAX compiles for minutes")
@every_estimator
def test_in_chunks_it_is_the_same(name):
    matrix = with_eigenvalues(3 * 0.8 ** np.arange(SIZE), SIZE) + 0.01 * normal(SIZE, SIZE)
    found = []
    for chunk_size in (3, 100):
        counts, of_matrix = recorded(matrix, chunk_size=chunk_size)
        found.append(values(ESTIMATORS[name](of_matrix)))
        assert 0 < max(counts) <= chunk_size
    assert_same(*found, rtol=1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("count", [1, 3, 7, 9])
def test_products_in_chunks(count):
    matrix, left, right = normal(5, 4), normal(count, 2, 4), normal(count, 2, 5)
    counts, of_matrix = recorded(matrix, chunk_size=3)
    np.testing.assert_allclose(numbers([of_matrix.matvec(ops.convert_to_tensor(left))])[0], left @ matrix.T)
    np.testing.assert_allclose(numbers([of_matrix.rmatvec(ops.convert_to_tensor(right))])[0], right @ matrix)
    assert set(counts) == {min(count, 3)}
    transpose = of_matrix.transpose
    assert transpose.shape == (4, 5)
    assert transpose.chunk_size == 3
    assert transpose.upright.shape == of_matrix.upright.shape == (5, 4)
    np.testing.assert_allclose(numbers([transpose.matvec(ops.convert_to_tensor(right))])[0], right @ matrix)
    np.testing.assert_allclose(numbers([of_matrix.basis()])[0][:, 1], np.eye(4))


@pytest.mark.slow
@pytest.mark.skipif(BACKEND == "torch", reason="Torch runs it as it is")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_it_is_the_same_and_compiled_once(name):
    model = randomize(network())
    points = [ops.convert_to_tensor(normal(2, SIZE, seed=seed).astype("float32")) for seed in (0, 1)]
    traced = []

    def estimate(x):
        traced.append(name)
        return tuple(ESTIMATORS[name](jvpreg.linearize(model, x)))[:5]

    run = compiled(estimate)
    received = [values(run(x)) for x in points]
    assert len(traced) == 1
    # In float32 an iteration may take a step more or less. Then its counts differ, but its value does not.
    for given, x in zip(received, points, strict=True):
        np.testing.assert_allclose(given[0], values(estimate(x))[0], rtol=2e-3, atol=1e-4)
        if BACKEND == "jax":
            break  # Eager operations take long on JAX, so one point is enough.
    assert np.abs(received[0][0] - received[1][0]).max() > 1e-4


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="others have no unknown sizes")
def test_a_batch_of_unknown_size_in_one_graph():
    """One graph holds all estimators, and two batch sizes run through it."""
    import tensorflow as tf

    model, traced = randomize(network()), []

    @tf.function(input_signature=[tf.TensorSpec((None, SIZE))], autograph=False)
    def estimate(x):
        traced.append(x)
        lin = jvpreg.linearize(model, x)
        return {name: tuple(estimator(lin))[:5] for name, estimator in ESTIMATORS.items()}

    inputs = normal(5, SIZE).astype("float32")
    for batch_size in (2, 5):
        received = estimate(inputs[:batch_size])
        for name in ESTIMATORS:
            assert received[name][0].shape[0] == batch_size
    assert len(traced) == 1
    lin = jvpreg.linearize(model, inputs)
    for name, estimator in ESTIMATORS.items():
        expected = values(tuple(estimator(lin))[:5])
        np.testing.assert_allclose(values(received[name])[0], expected[0], rtol=2e-3, atol=1e-4, err_msg=name)


@pytest.mark.skipif(BACKEND == "jax", reason="op by op, JAX compiles for minutes")
@every_estimator
def test_mixed_precision(name):
    """Weights in float32, products in float16, estimates in float32."""
    models = {}
    for policy in ("mixed_float16", "float32"):
        keras.config.set_dtype_policy(policy)
        try:
            models[policy] = randomize(network())
        finally:
            keras.config.set_dtype_policy("float32")
    x = normal(2, SIZE)
    assert keras.backend.standardize_dtype(models["mixed_float16"](x).dtype) == "float16"
    received, expected = (ESTIMATORS[name](jvpreg.linearize(model, x)) for model in models.values())
    assert keras.backend.standardize_dtype(received[0].dtype) in ("float32", "complex64")
    assert_same(values(received)[:1] * 4, values(expected)[:1] * 4, rtol=2e-2)


def test_of_random_numbers_each_example_has_its_own():
    found = numbers(estimators.frobenius_norm(operator(normal(SIZE, SIZE).astype("float32"), 5), num_probes=4))
    assert len(np.unique(found[0])) == 5


WITHOUT_TRANSPOSE = {
    "frobenius_norm": lambda o: estimators.frobenius_norm(o, 4, side="input"),
    "singular_values": estimators.singular_values,
    "top_singular_values": estimators.top_singular_values,
    "condition_number": estimators.condition_number,
    "top_eigenvalues": lambda o: estimators.top_eigenvalues(o, num_iterations=3),
    "trace": lambda o: estimators.trace(o, 6),
    "log_determinant of J": lambda o: estimators.log_determinant(o, "J"),
    "stable_rank": lambda o: estimators.stable_rank(o, num_probes=32),
    "effective_rank": estimators.effective_rank,
}
WITH_TRANSPOSE = {
    "frobenius_norm": lambda o: estimators.frobenius_norm(o, 4, side="output"),
    "top_singular_values": lambda o: estimators.top_singular_values(o, num_iterations=2),
    "log_determinant": lambda o: estimators.log_determinant(o, num_probes=2, num_iterations=2),
    "log_determinant of J": lambda o: estimators.log_determinant(o, "J", num_probes=2, num_iterations=2),
    "stable_rank": lambda o: estimators.stable_rank(o, num_probes=4, num_iterations=2),
    "singular_values of the wide": lambda o: estimators.singular_values(operator(normal(3, 4), transposed=False)),
}


@pytest.mark.skipif(BACKEND == "jax", reason="op by op, JAX compiles for minutes")
@pytest.mark.parametrize("name", WITHOUT_TRANSPOSE)
def test_what_needs_no_transpose_does_without(name):
    matrix = (np.eye(SIZE) + 0.01 * normal(SIZE, SIZE)).astype("float32")
    received, expected = (
        values(WITHOUT_TRANSPOSE[name](operator(matrix, transposed=transposed))) for transposed in (False, True)
    )
    assert_same(received, expected, rtol=1e-6)


def test_without_the_transpose_the_norm_is_probed_from_the_input():
    matrix = normal(SIZE, SIZE).astype("float32")
    received = estimators.frobenius_norm(operator(matrix, transposed=False), 4)
    expected = estimators.frobenius_norm(operator(matrix, transposed=False), 4, side="input")
    assert_same(values(received), values(expected), rtol=1e-6)


@pytest.mark.parametrize("name", WITH_TRANSPOSE)
def test_what_needs_the_transpose_says_so(name):
    with pytest.raises(ValueError, match=r"needs products with the transpose.*an operator without `rmatvec`"):
        WITH_TRANSPOSE[name](operator(normal(SIZE, SIZE).astype("float32"), transposed=False))


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("shape", (3,), r"`shape`. Expected \(m, n\), two positive integers. Received: shape=\(3,\)"),
        ("shape", (3, 0), r"`shape`. Expected \(m, n\)"),
        ("shape", (3, None), r"`shape`. Expected \(m, n\)"),
        ("shape", 3, r"`shape`. Expected \(m, n\)"),
        ("chunk_size", 0, r"`chunk_size`. Expected an integer, 1 or more. Received: chunk_size=0"),
        ("chunk_size", None, r"`chunk_size`. Expected an integer, 1 or more. Received: chunk_size=None"),
    ],
)
def test_bad_arguments(argument, value, message):
    arguments = {"shape": (3, 3), "batch_size": 1, argument: value}
    with pytest.raises(ValueError, match=message):
        Operator(lambda v: v, None, **arguments)


@pytest.mark.parametrize("estimator", [estimators.frobenius_norm, estimators.trace, estimators.top_singular_values])
def test_neither_a_linearization_nor_an_operator(estimator):
    with pytest.raises(
        ValueError, match=r"(?s)`linearization`. Expected what `jvpreg.linearize` returns, or a.*linearization=array"
    ):
        estimator(np.eye(3))


def test_integers_may_be_those_of_numpy():
    matrix = operator(normal(6, 5).astype("float32"))
    assert tuple(matrix.shape) == (6, 5)
    found = estimators.top_singular_values(matrix, k=np.int64(2))
    assert found.value.shape == (1, 2)
    Operator(lambda v: v, None, shape=np.array([3, 3]), batch_size=1)


def test_several_inputs_and_outputs_are_one_long_vector_each():
    a, b = keras.Input((2, 3)), keras.Input((4,))
    joined = layers.Concatenate()([layers.Flatten()(a), b])
    model = keras.Model([a, b], [layers.Dense(5)(joined), layers.Dense(2)(b)])
    lin = jvpreg.linearize(model, [np.ones((3, 2, 3)), np.ones((3, 4))])
    one, two = (weights for weights in model.get_weights() if weights.ndim == 2)
    if one.shape[0] != 10:
        one, two = two, one
    matrix = np.concatenate([one, np.concatenate([np.zeros((6, 2)), two])], axis=1).T
    of_model = estimators.operator.as_operator(lin)
    assert of_model.shape == (7, 10)
    found = numbers([of_model.matvec(of_model.basis())])[0]
    for b in range(3):
        np.testing.assert_allclose(found[:, b].T, matrix, atol=1e-6)
    back = numbers([of_model.transpose.matvec(of_model.transpose.basis())])[0]
    np.testing.assert_allclose(back[:, 0], matrix, atol=1e-6)
    assert tree.flatten(lin.outputs)[0].shape == (3, 5)
