"""Attributions of tokens and of several inputs, against autodiff in float64; complete sums, batches and rules."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg.attribution import saliency
from jvpreg.engine.transpose import transpose
from tests.compare import assert_close, normal, numpy, randomize

pytestmark = pytest.mark.usefixtures("float64")

TOKENS = np.array([[3, 1, 4, 1, 5], [2, 6, 5, 0, 0], [8, 0, 0, 0, 0]], "int32")
LABELS = np.array([1, 0, 1])


def of_sentences():
    """A model of token ids under a mask, with an embedding of positions that is added to that of the tokens."""
    ids = keras.Input((5,), dtype="int32")
    places = ops.where(ids != 0, np.arange(1, 6, dtype="int32"), 0)
    positions = layers.Embedding(6, 4, mask_zero=True, name="positions")(places)
    y = layers.Add()([positions, layers.Embedding(9, 4, mask_zero=True, name="words")(ids)])
    # No attention: Keras' own rounds to float32 on some backends.
    y = layers.LSTM(5, return_sequences=True)(y)
    y = layers.GlobalAveragePooling1D()(layers.Dense(6, activation="gelu")(y))
    return randomize(keras.Model(ids, layers.Dense(2)(y)))


def behind(model, tokens=TOKENS):
    """The model as a function of what the embedding `words` returned, by Keras alone, and that point."""
    embedding = model.get_layer("words")
    point, run = embedding(tokens), embedding.call

    def rest(embedded):
        embedding.call = lambda ids: embedded
        try:
            return model(tokens)
        finally:
            embedding.call = run

    return rest, ops.convert_to_tensor(numpy(point))


def autodiff(model, labels, tokens=TOKENS):
    """The embeddings, and by the backend's reverse mode the gradient of each example's class by them."""
    rest, point = behind(model, tokens)
    (gradient,) = transpose(lambda points: [rest(points[0])], [point], [ops.convert_to_tensor(np.eye(2)[labels])])
    return numpy(point), numpy(gradient)


def test_tokens_against_autodiff():
    """Raw, summed with the sign, and by the norm; tokens under a mask have exactly zero."""
    model = of_sentences()
    point, gradient = autodiff(model, LABELS)
    of_model = functools.partial(saliency.input_gradient, model, TOKENS, LABELS, at="words")
    assert_close(of_model(reduce=None), gradient)
    assert_close(of_model(reduce="norm"), np.linalg.norm(gradient, axis=-1))
    assert_close(of_model(), np.abs(gradient).sum(axis=-1))
    assert_close(of_model(reduce="sum"), gradient.sum(axis=-1))
    products = saliency.gradient_times_input(model, TOKENS, LABELS, at="words")
    assert_close(products, (point * gradient).sum(axis=-1))
    for found in (products, of_model(reduce="norm")):
        np.testing.assert_array_equal(numpy(found) == 0, TOKENS == 0)


def test_tokens_and_intercepts_sum_to_the_output():
    """Positions were computed before the tokens' embeddings: they are a constant, which counts as an intercept."""
    model = of_sentences()
    full = jvpreg.full_jacobian(model, TOKENS, LABELS, at="words")
    outputs = numpy(model(TOKENS))[np.arange(3), LABELS]
    products = numpy(saliency.gradient_times_input(model, TOKENS, LABELS, at="words"))
    assert_close(full.from_input(), products.sum(axis=1))
    assert_close(products.sum(axis=1) + numpy(full.from_biases()), outputs)
    assert numpy(full.completeness_error()).max() < 1e-10
    assert np.abs(numpy(full.from_biases())).min() > 1e-2


@pytest.mark.slow
def test_integrated_gradients_of_tokens_are_complete():
    """The model goes on from the points on the line under the mask of the ids; raw parts sum to the difference."""
    model = of_sentences()
    rest, point = behind(model)
    for baseline in (0.0, numpy(point)[:, ::-1]):
        ends = [numpy(rest(ops.convert_to_tensor(p + 0 * numpy(point)))) for p in (numpy(point), baseline)]
        difference = (ends[0] - ends[1])[np.arange(3), LABELS]
        found, delta = saliency.integrated_gradients(
            model, TOKENS, LABELS, baseline, 8, at="words", reduce=None, return_convergence_delta=True
        )
        assert_close(ops.sum(found, axis=(1, 2)), difference, 1e-6)
        assert_close(ops.sum(found, axis=(1, 2)) - delta, difference)


def smooth(activation="tanh"):
    keras.utils.set_random_seed(0)
    x = keras.Input((4, 4, 2))
    y = layers.Flatten()(layers.Conv2D(4, 3, activation=activation)(x))
    return randomize(keras.Model(x, layers.Dense(2)(layers.Dense(6, activation=activation)(y))))


@pytest.mark.slow
def test_gauss_legendre_nodes_are_for_smooth_models():
    """Of a smooth model their error falls as no power of the step; the gradient of a ReLU jumps, for either rule."""
    x = np.abs(normal(3, 4, 4, 2))

    def error(model, method, num_steps):
        arguments = {"num_steps": num_steps, "method": method, "return_convergence_delta": True}
        maps, delta = saliency.integrated_gradients(model, x, LABELS, **arguments)
        rows = np.arange(3), LABELS
        difference = numpy(model(x))[rows] - numpy(model(0 * x))[rows]
        assert_close(numpy(maps).sum(axis=(1, 2)) - numpy(delta), difference)
        return np.abs(numpy(delta)).max() / np.abs(difference).max()

    assert error(smooth(), "gausslegendre", 16) < 1e-6
    assert error(smooth(), "riemann_middle", 16) > 1e-4
    assert error(smooth("relu"), "gausslegendre", 16) > 1e-4
    assert error(smooth("relu"), "riemann_middle", 64) < error(smooth("relu"), "riemann_middle", 2)


def several():
    """Two images of different sizes with a layer of their own each, whole numbers, and measured numbers."""
    left, right = keras.Input((6, 6, 2), name="left"), keras.Input((4, 4, 1), name="right")
    code, numbers = keras.Input((2,), dtype="int32", name="code"), keras.Input((3,), name="numbers")
    parts = [layers.Conv2D(2, 3, activation="tanh", name="left_conv")(left)]
    parts += [layers.Conv2D(2, 3, activation="tanh", name="right_conv")(right)]
    parts = [layers.Flatten()(part) for part in parts] + [layers.Flatten()(layers.Embedding(5, 2)(code)), numbers]
    y = layers.Dense(2)(layers.Dense(4, activation="tanh")(layers.Concatenate()(parts)))
    model = keras.Model({"left": left, "right": right, "code": code, "numbers": numbers}, y)
    x = {"left": normal(3, 6, 6, 2), "right": normal(3, 4, 4, 1), "numbers": normal(3, 3)}
    return randomize(model), {**x, "code": np.array([[1, 2], [3, 4], [0, 1]])}


def two_images():
    model, x = several()
    left, right = keras.Input((6, 6, 2), name="left"), keras.Input((4, 4, 1), name="right")
    pooled = [layers.GlobalAveragePooling2D()(model.get_layer(f"{name}_conv")(image)) for name, image in
              (("left", left), ("right", right))]  # fmt: skip
    y = layers.Dense(2)(layers.Concatenate()(pooled))
    return randomize(keras.Model({"right": right, "left": left}, y)), {name: x[name] for name in ("left", "right")}


def test_each_input_has_its_map():
    model, x = several()
    gradient = jvpreg.linearize(model, x).vjp(np.eye(2)[LABELS])
    expected = {name: np.abs(numpy(gradient[name])).sum(axis=-1) for name in ("left", "right")}
    expected |= {"numbers": np.abs(numpy(gradient["numbers"])), "code": np.zeros((3, 2))}
    found = saliency.input_gradient(model, x, LABELS)
    assert set(found) == set(expected)
    for name, part in expected.items():
        np.testing.assert_allclose(numpy(found[name]), part, rtol=1e-10)
    baseline = dict.fromkeys(x, 0.5)
    parts, delta = saliency.integrated_gradients(
        model, x, LABELS, baseline, 32, reduce=None, return_convergence_delta=True
    )
    # Whole numbers stay as they are on the line.
    start = {name: x[name] if name == "code" else np.full_like(x[name], 0.5) for name in x}
    difference = (numpy(model(x)) - numpy(model(start)))[np.arange(3), LABELS]
    total = sum(numpy(part).reshape(3, -1).sum(axis=1) for part in parts.values())
    assert_close(total, difference, 1e-8)
    assert_close(total - numpy(delta), difference)
    assert {name: part.shape for name, part in parts.items()} == {name: part.shape for name, part in x.items()}


def test_each_image_has_the_layers_that_depend_on_it():
    model, x = two_images()
    full = jvpreg.full_jacobian(model, x, LABELS)
    maps = saliency.full_jacobian(model, x, LABELS)
    heat = saliency.grad_cam(model, x, LABELS)
    for name in ("left", "right"):
        expected = np.abs((x[name] * numpy(full.input_jacobian[name])).sum(axis=-1))
        for node in (f"{name}_conv", f"{name}_conv/activation"):
            part = np.abs(numpy(full.bias_jacobians[node]).sum(axis=-1))
            expected += numpy(ops.image.resize(part[..., None], expected.shape[1:]))[..., 0]
        np.testing.assert_allclose(numpy(maps[name]), expected, rtol=1e-6)
        alone = saliency.grad_cam(model, x, LABELS, batch_size=2)
        np.testing.assert_allclose(numpy(heat[name]), numpy(alone[name]), rtol=1e-10)
        assert heat[name].shape == x[name].shape[:3]
    with pytest.raises(ValueError, match=r"`layer`. Expected a layer .* and depends on input 1"):
        saliency.grad_cam(model, [x["left"], x["right"]], LABELS, layer="left_conv")


BATCHED = {
    **saliency.METHODS,
    "gradient times input": saliency.gradient_times_input,
    "baselines": lambda *arguments, **options: saliency.integrated_gradients(
        *arguments, baseline=normal(3, 4, 4, 2, seed=5), num_steps=3, return_convergence_delta=True, **options
    ),
}


@pytest.mark.parametrize("name", BATCHED)
def test_batches_change_nothing(name):
    """For a class for all, for a class of each, for a cotangent, and for the largest output."""
    model, x = smooth("relu"), normal(3, 4, 4, 2)
    few = {"integrated gradients": {"num_steps": 2}, "SmoothGrad": {"num_samples": 2}}.get(name, {})
    for target in (1, LABELS, normal(3, 2, seed=4), None):
        found = BATCHED[name](model, x, target, batch_size=2, **few)
        assert_close(found, BATCHED[name](model, x, target, **few), 1e-12)


def test_bytes_are_real_numbers_on_the_line():
    """A model that is given bytes computes in floats, and is not rounded to bytes between two images."""
    model = keras.Sequential([keras.Input((2, 2, 1), dtype="uint8"), layers.Flatten(), layers.Dense(2)])
    x = np.arange(8, dtype="uint8").reshape(2, 2, 2, 1)
    kernel = numpy(model.layers[-1].kernel)
    expected = x.reshape(2, 4) * kernel[:, 1]
    found = saliency.integrated_gradients(model, x, 1, num_steps=3)
    assert_close(ops.reshape(found, (2, 4)), expected, 1e-6)


def test_the_figure_of_sentences(tmp_path):
    """Every token is written with its number, the rest is one box, and the written sum is that of the output."""
    model = of_sentences()
    full = jvpreg.full_jacobian(model, TOKENS, LABELS, at="words")
    products = numpy(saliency.gradient_times_input(model, TOKENS, LABELS, at="words"))
    words = [["not", "$so", "bad", "a", "film"], ["very", "good"], ["dull"]]
    page = saliency.token_figure(words, full, title="the title")
    written = [text.get_text() for text in page.axes[0].texts]
    assert written[:10:2] == words[0]
    assert written[1:10:2] == [f"{number:+.2f}".replace("-", "−") for number in products[0]]
    assert written[15:17] == ["rest", f"{products[1, 2]:+.2f}".replace("-", "−")]
    assert "rest" not in written[17:]  # what the mask hides contributes nothing
    sums = [text.replace("−", "-") for text in written if text.startswith("sum")]
    for text, output in zip(sums, numpy(full.target_output), strict=True):
        numbers = [float(word) for word in text.split() if word[0] in "+-"]
        assert sum(numbers[:-1]) == pytest.approx(numbers[-1], abs=0.005)
        assert numbers[-1] == pytest.approx(output, abs=0.001)
    page.savefig(tmp_path / "sentences.png")
    assert (tmp_path / "sentences.png").stat().st_size > 10_000
    for wrong in (words[:2], "not so bad", ["not", "so", "bad"], [["a"] * 6, [], []]):
        with pytest.raises(ValueError, match=r"`tokens`\. Expected"):
            saliency.token_figure(wrong, full)
    with pytest.raises(ValueError, match=r"`full`. Expected the full-Jacobian at embeddings \(B, T, E\)"):
        saliency.token_figure([["a"]], jvpreg.full_jacobian(smooth(), normal(1, 4, 4, 2)))
