"""Random directions: their second moments, their geometry, their seeds."""

import keras
import numpy as np
import pytest
from keras import ops, tree

from jvpreg import probes

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
    with pytest.raises(ValueError, match=r"`like`. Expected shapes that are known but for the batch. Received: .*None"):
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
