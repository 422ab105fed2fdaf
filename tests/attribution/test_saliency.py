"""Saliency maps: what each is defined by, and their common signature."""

import keras
import numpy as np
import pytest
from keras import layers

import jvpreg
from jvpreg.attribution import saliency
from tests.compare import normal, numpy, randomize

pytestmark = pytest.mark.usefixtures("float64")


def network(activation="relu"):
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 3))
    y = layers.Conv2D(4, 3, padding="same", activation=activation, name="first")(x)
    y = layers.MaxPooling2D(name="pool")(layers.BatchNormalization(name="norm")(y))
    y = layers.Add()([y, layers.Conv2D(4, 3, padding="same", activation=activation, name="second")(y)])
    return randomize(keras.Model(x, layers.Dense(3)(layers.GlobalAveragePooling2D()(y))))


X = np.abs(normal(2, 8, 8, 3, seed=1))


@pytest.mark.parametrize("name", saliency.METHODS)
def test_each_takes_images_and_a_target_and_returns_a_map(name):
    model, method = network(), saliency.METHODS[name]
    predicted = method(model, X)
    assert tuple(predicted.shape) == (2, 8, 8)
    largest = numpy(model(X)).argmax(axis=1)
    np.testing.assert_allclose(numpy(method(model, X, largest)), numpy(predicted), rtol=1e-12)
    others = numpy(method(model, X, (largest + 1) % 3))
    assert np.abs(others - numpy(predicted)).max() > 1e-6
    one = numpy(method(model, X[1:], largest[1:]))
    if name != "SmoothGrad":  # whose noise is drawn for the batch
        np.testing.assert_allclose(one[0], numpy(predicted)[1], rtol=1e-10, atol=1e-14)


def test_the_full_jacobian_map_is_equation_4():
    model = network()
    full = jvpreg.full_jacobian(model, X)
    expected = np.abs((X * numpy(full.input_jacobian)).sum(axis=-1))
    for contribution in map(numpy, full.bias_jacobians.values()):
        if contribution.ndim == 4:
            maps = np.abs(contribution.sum(axis=-1))
            expected += maps if maps.shape[1] == 8 else numpy(keras.ops.image.resize(maps[..., None], (8, 8)))[..., 0]
    np.testing.assert_allclose(numpy(saliency.full_jacobian(model, X)), expected, rtol=1e-6)
    at_input = np.abs((X * numpy(full.input_jacobian)).sum(axis=-1))
    np.testing.assert_allclose(numpy(saliency.bias_jacobian(model, X)), expected - at_input, rtol=1e-6, atol=1e-7)


def vectors():
    return keras.Sequential([keras.Input((3,)), layers.Dense(2)])


@pytest.mark.slow
def test_integrated_gradients_sum_to_the_difference():
    model = network("tanh")
    largest = numpy(model(X)).argmax(axis=1)
    for baseline in (0.0, 0.5):
        difference = (numpy(model(X)) - numpy(model(np.full_like(X, baseline))))[np.arange(2), largest]
        errors = []
        for num_steps in (8, 64):
            maps = numpy(saliency.integrated_gradients(model, X, baseline=baseline, num_steps=num_steps))
            errors.append(np.abs(maps.sum(axis=(1, 2)) - difference).max())
        # A winner of the max pooling that changes on the way leaves an error of the order of a step.
        assert errors[1] < 0.02 * np.abs(difference).max()
        assert errors[1] < errors[0]


def test_integrated_gradients_of_a_linear_model_are_exact():
    model = keras.Sequential([keras.Input((4, 4, 1)), layers.Flatten(), layers.Dense(3)])
    x = normal(2, 4, 4, 1)
    kernel, labels = numpy(model.layers[-1].kernel.value), np.array([0, 2])
    maps = numpy(saliency.integrated_gradients(model, x, labels, num_steps=1))
    np.testing.assert_allclose(maps, x[..., 0] * kernel[:, labels].T.reshape(2, 4, 4), rtol=1e-12)


def test_guided_backpropagation_stops_what_is_negative():
    """Worked out by hand: y = −relu(x₁) + 2·relu(x₂); the first ReLU's gradient is negative."""
    model = keras.Sequential([keras.Input((1, 2, 1)), layers.ReLU(), layers.Flatten(), layers.Dense(1, use_bias=False)])
    model.set_weights([np.array([[-1.0], [2.0]])])
    x = np.array([[[[3.0], [4.0]]]])
    np.testing.assert_allclose(numpy(saliency.guided_backpropagation(model, x)), [[[0.0, 2.0]]])
    np.testing.assert_allclose(numpy(saliency.input_gradient(model, x)), [[[1.0, 2.0]]])


def test_guided_backpropagation_without_relus_is_the_gradient():
    model = network("tanh")
    received, expected = (numpy(f(model, X)) for f in (saliency.guided_backpropagation, saliency.input_gradient))
    np.testing.assert_allclose(received, expected, rtol=1e-12)


def test_smooth_grad_without_noise_is_the_gradient():
    model = network()
    received = numpy(saliency.smooth_grad(model, X, noise=0.0, num_samples=3))
    np.testing.assert_allclose(received, numpy(saliency.input_gradient(model, X)), rtol=1e-12)
    noisy = numpy(saliency.smooth_grad(model, X, noise=0.3))
    assert np.abs(noisy - received).max() > 1e-3
    np.testing.assert_array_equal(noisy, numpy(saliency.smooth_grad(model, X, noise=0.3)))


def test_grad_cam_is_its_formula():
    model = network()
    lin = jvpreg.linearize(model, X)
    gradient = lin.after("pool").vjp(np.eye(3)[numpy(model(X)).argmax(axis=1)])
    weights = numpy(gradient).mean(axis=(1, 2), keepdims=True)
    small = np.maximum((weights * numpy(lin.node_outputs()["pool"])).sum(axis=-1), 0.0)
    expected = numpy(keras.ops.image.resize(small[..., None], (8, 8)))[..., 0]
    received = numpy(saliency.grad_cam(model, X, layer="pool"))
    np.testing.assert_allclose(received, expected, rtol=1e-6, atol=1e-9)
    assert received.max() > 0


@pytest.mark.slow
def test_the_figure_has_a_row_an_image_and_a_column_a_method(tmp_path):
    model = network()
    maps = {name: method(model, X) for name, method in saliency.METHODS.items()}
    page = saliency.figure(np.clip(X, 0, 1), maps, titles=["one", "two"])
    assert len(page.axes) == 2 * (1 + len(maps))
    page.savefig(tmp_path / "maps.png")
    assert (tmp_path / "maps.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: saliency.input_gradient(m, X[0]),
            r"`x`. Expected shape \(B, 8, 8, 3\)",
        ),
        (lambda m: saliency.full_jacobian(vectors(), X[:, 0, 0]), r"`x`. Expected images .* x with shape \(2, 3\)"),
        (lambda m: saliency.input_gradient(m, X, reduce="mean"), '`reduce`. Expected "sum", "abs", "norm" or None'),
        (lambda m: saliency.smooth_grad(m, X, batch_size=0), "`batch_size`. Expected an integer, 1 or more, or None"),
        (lambda m: saliency.input_gradient(m, X, [0, 1, 2], batch_size=1), "`target`"),
        (lambda m: saliency.input_gradient(m, X, np.zeros(3, int), batch_size=1), "`target`. Expected one for each of"),
        (lambda m: saliency.integrated_gradients(m, X, method="simpson"), "`method`. Expected .gausslegendre. or"),
        (
            lambda m: saliency.integrated_gradients(m, X, baseline=np.ones(2)),
            "`baseline`. Expected a number, or an arr",
        ),
        (lambda m: saliency.input_gradient(m, X, at="third"), "`at`. Expected the path of a layer"),
        (lambda m: saliency.integrated_gradients(m, X, num_steps=0), "`num_steps`. Expected an integer, 1 or more"),
        (lambda m: saliency.smooth_grad(m, X, num_samples=0.5), "`num_samples`. Expected an integer, 1 or more"),
        (lambda m: saliency.grad_cam(m, X, layer="third"), "`layer`. Expected the path of a layer"),
        (lambda m: saliency.grad_cam(m, X, layer="dense"), "`layer`. Expected a layer whose output is an image"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(network())
