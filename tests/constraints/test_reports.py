"""`verify`: the violations at points; and all of them on a segment or a rectangle, if the model is piecewise affine."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg.constraints import (
    Bounded,
    Invariant,
    KnownDerivative,
    Linear,
    Lipschitz,
    Monotone,
    Rectangle,
    Segment,
    verify,
)
from jvpreg.constraints.regions import points_of, regions
from tests.constraints.fields import linear, numbers, points


def hat():
    """`relu(x) − 3 relu(x − 1) + 2.5 relu(x − 3)`: slopes 0, 1, −2, 0.5."""
    model = keras.Sequential([keras.Input((1,)), layers.Dense(3, activation="relu"), layers.Dense(1, use_bias=False)])
    model.set_weights([np.ones((1, 3)), np.array([0.0, -1.0, -3.0]), np.array([[1.0], [-3.0], [2.5]])])
    return model


def network(*extra, size=2, width=6, seed=0):
    keras.utils.set_random_seed(seed)
    hidden = [layers.Dense(width, activation="relu", bias_initializer="random_normal") for _ in range(2)]
    return keras.Sequential([keras.Input((size,)), *hidden, *extra, layers.Dense(1)])


def test_points_are_reported_with_the_worst_first():
    model = hat()
    x = np.array([[-1.0], [0.5], [2.0], [4.0]])
    report = verify(model, Monotone([0], tolerance=0.1), x)
    np.testing.assert_allclose(report.violations, [0, 0, 2, 0], atol=1e-6)
    assert (report.mean, report.max, report.violated) == pytest.approx((0.5, 2.0, 0.25))
    assert report.worst.tolist() == [2]
    assert not report.holds
    assert "is violated at 1 of 4 points: mean 0.5, max 2 (tolerance 0.1)\n  point 2: 2, in component 0" in repr(report)
    good = verify(model, Bounded(-2.5, 1.5, [0]), x)
    assert good.holds
    assert "holds at 4 points" in repr(good)


def test_a_jacobian_model_and_several_batches():
    model = jvpreg.JacobianModel(linear([[-1.0, 2.0]]))
    report = verify(model, Monotone([0]), points(600))
    np.testing.assert_allclose(report.components, np.ones((600, 1)), rtol=1e-5)


def test_a_segment_is_cut_where_the_slope_changes():
    report = verify(hat(), Monotone([0]), Segment([-1.0], [5.0]))
    ends = [region.corners.ravel() * 6 - 1 for region in report.regions]
    np.testing.assert_allclose(ends, [[-1, 0], [0, 1], [1, 3], [3, 5]], atol=1e-4)
    np.testing.assert_allclose(report.violations, [0, 0, 2, 0], atol=1e-5)
    assert report.violated == pytest.approx(1 / 3, abs=1e-5)
    assert report.mean == pytest.approx(2 / 3, abs=1e-4)
    assert report.worst.tolist() == [2]
    assert "is violated in 1 of 4 affine regions, 33.3 % of the domain" in repr(report)
    assert verify(hat(), Lipschitz(2.01), Segment([-1.0], [5.0])).holds


def test_a_violation_that_points_miss_is_found():
    # A dip of width 0.002 at 0.3.
    model = keras.Sequential([keras.Input((1,)), layers.Dense(3, activation="relu"), layers.Dense(1, use_bias=False)])
    model.set_weights([np.ones((1, 3)), np.array([0.0, -0.3, -0.302]), np.array([[1.0], [-8.0], [8.0]])])
    assert verify(model, Monotone([0]), np.linspace(0, 1, 101).reshape(-1, 1) + 5e-3).holds
    report = verify(model, Monotone([0]), Segment([0.0], [1.0]))
    assert report.max == pytest.approx(7.0, rel=1e-4)
    assert report.violated == pytest.approx(0.002, rel=1e-2)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "model",
    [
        network,
        lambda: network(layers.LeakyReLU(0.2), layers.Dense(5)),
        lambda: network(layers.Reshape((3, 2)), layers.MaxPooling1D(2, padding="same"), layers.Flatten()),
        lambda: network(layers.PReLU(keras.initializers.Constant(0.3)), layers.Dense(5)),
        lambda: network(layers.Reshape((3, 2)), layers.SimpleRNN(4, activation="relu")),
        lambda: network(layers.Lambda(lambda x: keras.ops.maximum(x, 0.5) + keras.ops.where(x > 1, 2 * x - 1, x))),
    ],
)
def test_regions_of_a_segment_are_those_of_a_fine_grid(model):
    model = model()
    domain = Segment([-3.0, 1.0], [2.0, -2.0])
    found = regions(model, domain)
    assert len(found) > 3
    assert sum(region.size for region in found) == pytest.approx(1.0)
    along = np.array([[5.0, -3.0]])
    grid = np.linspace(0, 1, 4001)[:-1, None] + 1e-5

    def slope(places):
        lin = jvpreg.linearize(model, points_of(domain, places))
        return numbers(lin.jvp(np.tile(along, (len(places), 1))))[:, 0]

    of_region = slope([region.middle for region in found])
    ends = np.array([region.corners[1, 0] for region in found])
    np.testing.assert_allclose(slope(grid), of_region[np.searchsorted(ends, grid[:, 0])], atol=1e-9)


@pytest.mark.usefixtures("float64")
def test_regions_of_a_rectangle_tile_it_and_are_those_of_a_grid():
    model = network(layers.LeakyReLU(0.2), layers.Dense(3))
    domain = Rectangle([-2.0, -2.0], [4.0, 0.0], [0.0, 4.0])
    found = regions(model, domain)
    assert len(found) > 10
    assert sum(region.size for region in found) == pytest.approx(1.0)
    places = np.random.default_rng(0).uniform(size=(500, 2))

    def jacobians(at):
        return numbers(jvpreg.jacobian(model, points_of(domain, at)))[:, 0]

    of_region, of_place = jacobians([region.middle for region in found]), jacobians(places)
    for place, expected in zip(places, of_place, strict=True):
        inside = [i for i, region in enumerate(found) if _is_inside(region.corners, place)]
        assert inside
        assert any(np.allclose(of_region[i], expected, atol=1e-9) for i in inside)


def _is_inside(corners, place):
    edges = np.roll(corners, -1, axis=0) - corners
    away = place - corners
    turns = edges[:, 0] * away[:, 1] - edges[:, 1] * away[:, 0]
    return np.all(turns >= -1e-12)


def test_a_rectangle_in_more_dimensions_holds_the_other_inputs():
    model = network(size=5)
    corner = np.arange(5.0) / 5
    report = verify(model, Monotone([2]), Rectangle(corner, 2 * np.eye(5)[1], 3 * np.eye(5)[2]))
    sampled = verify(
        model,
        Monotone([2]),
        points_of(
            Rectangle(corner, 2 * np.eye(5)[1], 3 * np.eye(5)[2]), np.random.default_rng(0).uniform(size=(4000, 2))
        ).astype("float32"),
    )
    assert report.max >= sampled.max - 1e-5
    assert report.mean == pytest.approx(sampled.mean, abs=4 * sampled.violations.std() / np.sqrt(4000) + 1e-4)
    assert report.max > 0


@pytest.mark.parametrize(
    ("model", "domain"),
    [
        (lambda: network(layers.Activation("tanh")), Segment([-1.0, 0.0], [1.0, 0.0])),
        (lambda: network(layers.Activation("tanh")), Rectangle([0.0, 0.0], [1.0, 0.0], [0.0, 1.0])),
        (
            lambda: network(layers.Reshape((3, 2)), layers.MaxPooling1D(3), layers.Flatten()),
            Rectangle([-5.0, -5.0], [10.0, 0.0], [0.0, 10.0]),
        ),
    ],
)
def test_what_is_not_affine_in_between_is_an_error(model, domain):
    with pytest.raises(ValueError, match="which is not affine between"):
        verify(model(), Monotone([0]), domain)


def _by_argsort(pair):
    return ops.take_along_axis(pair, ops.argsort(pair, axis=-1)[:, 1:], axis=-1)


def _by_comparison(pair):
    first, second = pair[:, :1], pair[:, 1:]
    return first + (second - first) * ops.cast(second > first, "float64")


# The larger of two columns, by operations that freeze indices, shares or comparisons in place of masks.
SELECTIONS = {
    "top_k": lambda pair: ops.top_k(pair, 1)[0],
    "sort": lambda pair: ops.sort(pair, axis=-1)[:, 1:],
    "argsort": _by_argsort,
    "max": lambda pair: ops.max(pair, axis=-1, keepdims=True),
    "quantile": lambda pair: ops.quantile(pair, 1.0, axis=-1, keepdims=True),
    "comparison": lambda pair: (
        pair[:, :1] + (pair[:, 1:] - pair[:, :1]) * ops.cast(pair[:, 1:] > pair[:, :1], "float64")
    ),
    "absolute": lambda pair: 0.5 * (pair[:, :1] + pair[:, 1:] + ops.abs(pair[:, :1] - pair[:, 1:])),
    "norm": lambda pair: 1 - ops.norm(1 - pair, float("-inf"), axis=-1, keepdims=True),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", SELECTIONS)
def test_regions_of_a_hat_whose_ends_are_on_one_line(name):
    """From 0 up to 1/8, down to 0 again, and on at 0: the ends and the middle of the segment alone tell nothing."""
    if keras.backend.backend() == "jax" and name not in ("top_k", "comparison"):
        pytest.skip("compilation takes two seconds each, and regions are found alike on all")
    select = SELECTIONS[name]
    x = keras.Input((2,))
    t = x[:, :1]
    hat = select(ops.concatenate([0 * t, ops.minimum(t, 0.25 - t)], axis=-1))
    model = keras.Model(x, hat + 0 * x[:, 1:])
    found = regions(model, Segment([0.0, 1.0], [1.0, 1.0]))
    ends = np.array([region.corners[1, 0] for region in found if region.size > 1e-9])
    np.testing.assert_allclose(ends, [0.125, 0.25, 1.0], atol=1e-9)
    if name != "absolute":  # whose kink is at zero
        with pytest.raises(ValueError, match="which is not affine between"):
            regions(model, Rectangle([0.0, 0.0], [1.0, 0.0], [0.0, 1.0]))


@pytest.mark.usefixtures("float64")
def test_regions_of_what_stays_between_two_bounds():
    """Below and above the bounds the mask of a clip is the same."""
    x = keras.Input((1,))
    model = keras.Model(x, ops.maximum(ops.abs(ops.clip(x, -1, 1)), 0.5))
    found = regions(model, Segment([-2.0], [5.0]))
    kinks = np.array([7 * region.corners[1, 0] - 2 for region in found])
    np.testing.assert_allclose(kinks[(np.abs(kinks) > 1e-6)], [-1, -0.5, 0.5, 1, 5], atol=1e-9)


def test_what_is_left_to_autodiff_is_an_error():
    class Unknown(layers.Layer):
        def call(self, x):
            if not ops.is_tensor(x):
                raise TypeError("no symbols")
            return ops.abs(x)

    model = keras.Sequential([keras.Input((2,)), Unknown()])
    with pytest.raises(ValueError, match="Expected one whose operations all have a rule"):
        regions(model, Segment([-1.0, 0.0], [1.0, 0.0]))


@pytest.mark.parametrize(
    "constraint",
    [
        Invariant(lambda x: x),
        KnownDerivative(lambda x: x, [0]),
        Linear(lambda x, y, slopes: slopes[0] + y, [0]),
    ],
)
def test_what_is_not_constant_in_a_region_is_an_error(constraint):
    with pytest.raises(ValueError, match="Expected one on `J` in directions that are the same everywhere"):
        verify(network(), constraint, Segment([-1.0, 0.0], [1.0, 0.0]))


def test_too_many_regions(monkeypatch):
    monkeypatch.setattr("jvpreg.constraints.regions.MOST_REGIONS", 5)
    with pytest.raises(ValueError, match="has more than 5 affine regions here"):
        verify(network(), Monotone([0]), Rectangle([-2.0, -2.0], [4.0, 0.0], [0.0, 4.0]))
