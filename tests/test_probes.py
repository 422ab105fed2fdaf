"""Random directions: their second moments, their geometry, their seeds."""

import keras
import numpy as np
import pytest
from keras import ops, tree

import jvpreg
from jvpreg import probes
from jvpreg.attribution import saliency

numpy = ops.convert_to_numpy
KINDS = ["gaussian", "rademacher", "sphere", "orthogonal"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_moment_is_the_identity(kind):
    """Over 20,000 examples of 2 probes; an entry of the mean has a deviation of at most √2 / √20,000 = 0.01."""
    size = 5
    vectors = numpy(probes.draw(kind, np.zeros((20_000, size), "float32"), 2, seed=0)).astype("float64")
    for probe in vectors:
        second_moment = probe.T @ probe / len(probe)
        assert np.max(np.abs(second_moment - np.eye(size))) < 0.05
        assert np.max(np.abs(probe.mean(0))) < 0.035
    # Probes are of mean zero against each other: for independent ones and for orthogonal ones.
    assert abs(np.mean(np.sum(vectors[0] * vectors[1], -1))) < 0.08


@pytest.mark.parametrize("kind", ["sphere", "orthogonal"])
def test_radius(float64, kind):
    vectors = numpy(probes.draw(kind, np.zeros((7, 2, 3)), 4, seed=1))
    np.testing.assert_allclose(np.sum(vectors**2, axis=(2, 3)), 6.0, rtol=1e-12)


def test_rademacher_is_of_signs():
    vectors = numpy(probes.draw("rademacher", np.zeros((7, 6)), 4, seed=1))
    np.testing.assert_array_equal(np.abs(vectors), 1.0)
    assert 50 < np.sum(vectors > 0) < 118


@pytest.mark.parametrize("num_probes", [1, 4, 6])
def test_orthogonal_probes(float64, num_probes):
    vectors = numpy(probes.draw("orthogonal", np.zeros((3, 2, 3)), num_probes, seed=1)).reshape(num_probes, 3, 6)
    gram = np.einsum("pbd,qbd->bpq", vectors, vectors)
    np.testing.assert_allclose(gram, np.stack([6.0 * np.eye(num_probes)] * 3), atol=1e-12)
    assert np.max(np.abs(vectors[:, 0] - vectors[:, 1])) > 1e-2


def test_a_full_set_of_orthogonal_probes_is_exact(float64):
    """`mean ‖J u‖² = ‖J‖_F²`, without a Monte-Carlo error."""
    matrix = np.random.default_rng(0).normal(size=(4, 5))
    vectors = numpy(probes.draw("orthogonal", np.zeros((3, 5)), 5, seed=1))
    estimates = np.mean(np.sum((vectors @ matrix.T) ** 2, -1), axis=0)
    np.testing.assert_allclose(estimates, np.sum(matrix**2), rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_seeds(kind):
    like = np.zeros((3, 4), "float32")
    first = numpy(probes.draw(kind, like, 2, seed=5))
    np.testing.assert_array_equal(first, numpy(probes.draw(kind, like, 2, seed=5)))
    assert np.any(first != numpy(probes.draw(kind, like, 2, seed=6)))
    generator = keras.random.SeedGenerator(5)
    drawn = [numpy(probes.draw(kind, like, 2, seed=generator)) for _ in range(2)]
    assert np.any(drawn[0] != drawn[1])
    again = keras.random.SeedGenerator(5)
    np.testing.assert_array_equal(drawn[0], numpy(probes.draw(kind, like, 2, seed=again)))
    # Each example and each probe has a direction of its own.
    rows = drawn[0].reshape(6, 4)
    if kind != "rademacher":
        assert len(np.unique(rows, axis=0)) == 6


LIKE = np.zeros((3, 4), "float32")


def _model_of(seed):
    return jvpreg.JacobianModel(keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)]), seed=seed)


STREAMS = {
    **{kind: lambda seed, kind=kind: (keras.random.SeedGenerator(seed), _draw(kind)) for kind in KINDS},
    "between": lambda seed: (keras.random.SeedGenerator(seed), lambda g: jvpreg.constraints.between(RAMP, g)),
    "box": lambda seed: (keras.random.SeedGenerator(seed), lambda g: jvpreg.constraints.Box(0.0, 1.0, 3)(LIKE, g)),
    "model": lambda seed: (_model_of(seed).training_seed, _draw("gaussian")),
    "block": lambda seed: (jvpreg.layers.JacobianPenalty(keras.layers.Dense(1), [], seed)._seed_generator, by_keras),
    # A function of the user's own, as `at=`, draws from the model's generator by Keras.
    "own points": lambda seed: (_model_of(seed).training_seed, by_keras),
}
RAMP = np.arange(12, dtype="float32").reshape(3, 4)


def _draw(kind):
    return lambda generator: probes.draw(kind, np.zeros((8, 8), "float32"), 1, generator)


def by_keras(generator):
    return keras.random.normal((8,), seed=generator)


@pytest.mark.parametrize("stream", STREAMS)
def test_no_draw_of_a_seed_is_a_later_one_of_its_neighbour(stream):
    drawn = [numpy(draw(generator)) for g, draw in map(STREAMS[stream], (0, 1, 2)) for generator in [g] * 4]
    different = {array.tobytes() for array in drawn}
    assert len(different) == len(drawn) == 12


def test_the_parts_of_a_model_of_one_seed_share_no_draw():
    """Training, evaluation, carried state, and a generator of the user's with the same seed: each draws differently."""
    model = _model_of(0)
    regularizers = [jvpreg.regularizers.SpectralNorm(1.0, name=name) for name in "ab"]
    model.compile("sgd", "mse", jacobian_regularizers=regularizers)
    generators = [model.training_seed, model.evaluation_seed, keras.random.SeedGenerator(0)]
    drawn = [numpy(keras.random.normal((1,), seed=generator)) for generator in generators for _ in range(3)]
    drawn += [numpy(tracker.carried).ravel() for tracker in model.penalty_metrics]
    assert len({array.tobytes() for array in drawn}) == len(drawn) == 11


def test_smooth_grad_has_noise_of_its_own_for_each_seed():
    """The second copy of seed 0 must not be the first copy of seed 1."""
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 1)).astype("float32")
    square = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Flatten(), keras.layers.Lambda(keras.ops.square)])
    target = np.ones((1, 16), "float32")
    # The gradient of Σ x² is 2 x: with one copy, the map is twice the noisy image.
    one = [numpy(saliency.smooth_grad(square, x, target, num_samples=1, seed=seed)) for seed in (0, 1)]
    two = numpy(saliency.smooth_grad(square, x, target, num_samples=2, seed=0))
    assert np.max(np.abs(two - (one[0] + one[1]) / 2)) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_structures(float64, kind):
    like = {"image": np.zeros((3, 2, 2)), "features": [np.zeros((3, 5)), np.zeros((3,))]}
    directions = probes.draw(kind, like, 4, seed=0)
    tree.assert_same_structure(directions, like)
    shapes = [tuple(direction.shape) for direction in tree.flatten(directions)]
    assert shapes == [(4, 3, 5), (4, 3), (4, 3, 2, 2)]
    if kind in ("sphere", "orthogonal"):
        # One direction in the space of all of them, of dimension 5 + 1 + 4.
        squares = sum(np.sum(numpy(d).reshape(4, 3, -1) ** 2, -1) for d in tree.flatten(directions))
        np.testing.assert_allclose(squares, 10.0, rtol=1e-12)


def test_basis():
    like = [np.zeros((2, 3)), np.zeros((2, 1, 2))]
    first, second = (numpy(part) for part in probes.basis(like))
    assert first.shape == (5, 2, 3)
    assert second.shape == (5, 2, 1, 2)
    both = np.concatenate([first, second.reshape(5, 2, 2)], -1)
    for example in range(2):
        np.testing.assert_array_equal(both[:, example], np.eye(5))


def test_dimension():
    assert probes.dimension(np.zeros((7, 2, 3))) == 6
    assert probes.dimension([np.zeros((7, 2, 3)), np.zeros((7,))]) == 7
    with pytest.raises(ValueError, match=r"`like`. Expected shapes that are known, except the batch. Received: .*None"):
        probes.dimension(keras.Input((None, 3)))
    assert probes.dimension(keras.Input((4, 3))) == 12


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_directions_are_of_float32_at_least(dtype):
    like = ops.zeros((2, 3), dtype=dtype)
    expected = keras.backend.result_type(dtype, "float32")
    for kind in KINDS:
        assert keras.backend.standardize_dtype(probes.draw(kind, like, 2, seed=0).dtype) == expected
    assert keras.backend.standardize_dtype(probes.basis(like).dtype) == expected


def test_errors():
    with pytest.raises(ValueError, match=r"`kind`. Expected .gaussian., .* Received: kind='uniform'"):
        probes.draw("uniform", np.zeros((2, 3)), 1, seed=0)
    with pytest.raises(ValueError, match=r"`num_probes`. Expected at most 3, .* orthogonal .* Received: num_probes=4"):
        probes.draw("orthogonal", np.zeros((2, 3)), 4, seed=0)
