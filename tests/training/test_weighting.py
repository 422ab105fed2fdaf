"""Weights of examples reach the penalties as they reach the loss, in every form that Keras takes."""

import keras
import numpy as np
import pytest
from keras import layers, ops, tree

import jvpreg
from jvpreg.constraints import AugmentedLagrangian, KnownDerivative, Monotone
from jvpreg.estimators.norms import squared_norm
from jvpreg.regularizers import JacobianRegularizer

STRENGTH = 0.3
BACKEND = keras.backend.backend()
SIZE, WEIGHTS = 6, np.array([0.0, 2.0, 1.0, 0.0, 0.5, 3.0], "float32")
OTHER = np.array([1.0, 0.0, 4.0, 0.0, 2.5, 1.0], "float32")


class AlongOnes(JacobianRegularizer):
    """`‖J 1‖²`: a penalty without chance in it."""

    def directions(self, inputs, labels, seed):
        return tree.map_structure(lambda x: ops.expand_dims(ops.ones_like(x), 0), inputs)

    def penalty(self, seen):
        return squared_norm(seen.jvp)[0]


def inputs():
    return np.random.default_rng(0).normal(size=(SIZE, 3)).astype("float32")


def two_outputs(kind):
    """A model of two outputs; kinds differ in how the outputs are put together."""
    x = keras.Input((3,))
    h = layers.Dense(4, "tanh")(x)
    p, q = layers.Dense(2, name="p")(h), layers.Dense(1, name="q")(h)
    return keras.Model(x, structured(kind, p, q))


def structured(kind, p, q):
    return {"dict": {"p": p, "q": q}, "list": [p, q], "nested": {"a": {"p": p}, "b": {"c": q}}}[kind]


def slopes_squared(base, x):
    """`‖J 1‖²` of each example, by central differences in numpy: `(B,)`."""
    e = 1e-2
    ends = [tree.flatten(base(x + sign * e)) for sign in (1, -1)]
    parts = [(ops.convert_to_numpy(a) - ops.convert_to_numpy(b)) / (2 * e) for a, b in zip(*ends, strict=True)]
    return sum(np.sum(part.reshape(len(x), -1) ** 2, axis=1) for part in parts)


def compiled(base, regularizers=None, loss="mse", **arguments):
    model = jvpreg.JacobianModel(base, seed=3)
    rules = [AlongOnes(STRENGTH)] if regularizers is None else regularizers
    model.compile(keras.optimizers.SGD(0.0), loss, jacobian_regularizers=rules, **arguments)
    return model


def plain_logs(base, x, y, weights, loss="mse", **arguments):
    """What Keras logs for the plain model: the loss and the weighted metrics are to stay as these are."""
    base.compile("sgd", loss, **arguments)
    return base.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dict", "list", "nested"])
@pytest.mark.parametrize("several", [False, True])
def test_several_outputs(kind, several):
    x, base = inputs(), two_outputs(kind)
    y = structured(kind, np.ones((SIZE, 2), "float32"), np.zeros((SIZE, 1), "float32"))
    weights = structured(kind, WEIGHTS, OTHER) if several else WEIGHTS
    mean = (WEIGHTS + OTHER) / 2 if several else WEIGHTS
    metrics = {"loss": structured(kind, "mse", "mse")}
    if kind != "nested":  # Keras takes no metrics for deeper structures.
        metrics["weighted_metrics"] = structured(kind, ["mae"], ["mae"])
    expected = plain_logs(base, x, y, weights, **metrics)
    logs = compiled(base, **metrics).evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)
    penalty = np.mean(mean * slopes_squared(base, x))
    np.testing.assert_allclose(logs.pop("along_ones"), penalty, rtol=2e-3)
    np.testing.assert_allclose(logs.pop("loss"), expected.pop("loss") + STRENGTH * penalty, rtol=2e-3)
    assert logs == pytest.approx(expected, rel=1e-5)
    assert len(logs) == 2 * len(metrics)


@pytest.mark.slow
def test_zeros_for_every_output_leave_nothing():
    x, base = inputs(), two_outputs("dict")
    y = {"p": np.ones((SIZE, 2)), "q": np.ones((SIZE, 1))}
    model = compiled(base, loss={"p": "mse", "q": "mse"})
    assert model.evaluate(x, y, sample_weight=np.zeros(SIZE), verbose=0, return_dict=True)["loss"] == 0.0
    assert model.evaluate(x, y, verbose=0, return_dict=True)["loss"] > 0.1


@pytest.mark.parametrize("shape", [(SIZE, 5), (SIZE, 5, 1)])
def test_weights_of_steps_in_time_are_averaged_over_an_example(shape):
    x = np.random.default_rng(0).normal(size=(SIZE, 5, 2)).astype("float32")
    y = np.zeros((*shape, 3), "float32")
    base = keras.Sequential([keras.Input((5, 2)), layers.Dense(3, "tanh"), layers.Reshape((*shape[1:], 3))])
    weights = np.random.default_rng(1).integers(0, 3, shape).astype("float32")
    expected = plain_logs(base, x, y, weights)
    logs = compiled(base).evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)
    penalty = np.mean(weights.reshape(SIZE, -1).mean(axis=1) * slopes_squared(base, x))
    np.testing.assert_allclose(logs["along_ones"], penalty, rtol=2e-3)
    np.testing.assert_allclose(logs["loss"], expected["loss"] + STRENGTH * penalty, rtol=2e-3)


# ---------------------------------------------------------------- labels that are a regularizer's own


def known(**arguments):
    return KnownDerivative("dy", directions=[0, 1, 2], **arguments)


def one_output():
    return keras.Sequential([keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(2)])


def sobolev_data():
    random = np.random.default_rng(2)
    return {"y": random.normal(size=(SIZE, 2)), "dy": random.normal(size=(SIZE, 3, 2))}


@pytest.mark.parametrize("own_weights", [False, True])
def test_beside_a_regularizer_s_own_labels(own_weights):
    x, y, base = inputs(), sobolev_data(), one_output()
    weights = {"y": WEIGHTS, "dy": OTHER} if own_weights else WEIGHTS
    expected = plain_logs(base, x, y["y"], WEIGHTS, weighted_metrics=["mae"], metrics=["mse"])
    model = compiled(base, [known(), AlongOnes(STRENGTH)], weighted_metrics=["mae"], metrics=["mse"])
    logs = model.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)
    jacobian = np.moveaxis(ops.convert_to_numpy(jvpreg.jacobian(base, x)), 1, 2)
    apart = np.sum((jacobian - y["dy"]) ** 2, axis=(1, 2))
    np.testing.assert_allclose(
        logs["known_derivative"], np.mean((OTHER if own_weights else WEIGHTS) * apart), rtol=1e-4
    )
    np.testing.assert_allclose(logs["along_ones"], np.mean(WEIGHTS * slopes_squared(base, x)), rtol=2e-3)
    for name in ("mae", "mse"):
        np.testing.assert_allclose(logs[name], expected[name], rtol=1e-5)
    total = expected["loss"] + logs["known_derivative"] + STRENGTH * logs["along_ones"]
    np.testing.assert_allclose(logs["loss"], total, rtol=1e-5)


def test_only_the_loss_or_only_the_own_labels_are_weighed():
    x, y, base = inputs(), sobolev_data(), one_output()
    model = compiled(base, [known()])
    plain = model.test_on_batch(x, y, return_dict=True)
    weighed = plain_logs(one_output_like(base), x, y["y"], WEIGHTS)["loss"]
    # The penalty has the weights of the loss, since the derivatives have none of their own.
    logs = model.test_on_batch(x, y, {"y": WEIGHTS}, return_dict=True)
    np.testing.assert_allclose(logs["loss"] - logs["known_derivative"], weighed, rtol=1e-4)
    assert logs["known_derivative"] != pytest.approx(plain["known_derivative"])
    logs = model.test_on_batch(x, y, {"dy": np.zeros(SIZE)}, return_dict=True)
    assert logs["known_derivative"] == 0.0
    np.testing.assert_allclose(logs["loss"], plain["loss"] - plain["known_derivative"], rtol=1e-4)


def one_output_like(base):
    copy = keras.models.clone_model(base)
    copy.set_weights(base.get_weights())
    return copy


def test_derivatives_are_labels_enough_where_there_is_no_loss():
    base = keras.Sequential([keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(2, use_bias=False)])
    model = jvpreg.JacobianModel(base)
    model.compile(keras.optimizers.SGD(0.1), jacobian_regularizers=[known()])
    y = {"dy": sobolev_data()["dy"]}
    history = model.fit(inputs(), y, epochs=3, sample_weight={"dy": WEIGHTS}, verbose=0).history
    assert history["loss"] == history["known_derivative"]
    assert history["loss"][2] < 0.9 * history["loss"][0]


CLASSES = {0: 0.0, 1: 1.0, 2: 3.0}


@pytest.mark.parametrize("call", ["fit", "train_on_batch"])
@pytest.mark.parametrize("one_hot", [False, True])
def test_class_weights_beside_own_labels(call, one_hot):
    x, base = inputs(), keras.Sequential([keras.Input((3,)), layers.Dense(3)])
    classes = np.array([0, 1, 2, 2, 1, 0])
    loss = keras.losses.CategoricalCrossentropy if one_hot else keras.losses.SparseCategoricalCrossentropy
    y = {"y": np.eye(3)[classes] if one_hot else classes, "dy": np.zeros((SIZE, 3, 3))}
    expected = plain_logs(base, x, y["y"], np.array([0.0, 1.0, 3.0])[classes], loss=loss(from_logits=True))
    model = compiled(base, [known()], loss=loss(from_logits=True))
    if call == "fit":
        logs = {key: values[0] for key, values in model.fit(x, y, class_weight=CLASSES, verbose=0).history.items()}
    else:
        logs = model.train_on_batch(x, y, class_weight=CLASSES, return_dict=True)
    squares = np.sum(base.get_weights()[0] ** 2)
    np.testing.assert_allclose(logs["known_derivative"], squares * 8 / 6, rtol=1e-4)
    np.testing.assert_allclose(logs["loss"] - logs["known_derivative"], expected["loss"], rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"y": None, "sample_weight": WEIGHTS}, "argument `sample_weight`. Expected None where there are no labels"),
        ({"class_weight": CLASSES, "validation_split": 0.5}, "argument `class_weight`. Expected None"),
        ({"y": {"y": WEIGHTS, "z": WEIGHTS, "dy": WEIGHTS}, "class_weight": CLASSES}, "argument `class_weight`"),
        ({"y": {"y": WEIGHTS}}, r"argument `y`. Expected a dict with the labels of the loss and \['dy'\]"),
        ({"y": {"dy": WEIGHTS}}, "argument `y`. Expected a dict"),
    ],
)
def test_what_cannot_be_weighed(arguments, message):
    model = compiled(one_output(), [known()])
    with pytest.raises(ValueError, match=message):
        model.fit(inputs(), **{"y": sobolev_data(), "verbose": 0, **arguments})


def test_weights_without_labels_in_an_evaluation():
    with pytest.raises(ValueError, match="argument `sample_weight`"):
        compiled(one_output()).evaluate(inputs(), sample_weight=WEIGHTS, verbose=0)


# ---------------------------------------------------------------- where data come from


def _arrays(x, y, weights):
    return {"x": x, "y": y, "sample_weight": weights, "batch_size": 3}


def _dataset(x, y, weights):
    import tensorflow as tf

    return {"x": tf.data.Dataset.from_tensor_slices((x, y, weights)).batch(3)}


class _Batches(keras.utils.PyDataset):
    def __init__(self, *data):
        super().__init__()
        self.data = data

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return tree.map_structure(lambda array: array[3 * index : 3 * index + 3], self.data)


def _generator(x, y, weights):
    batches = _Batches(x, y, weights)
    return {"x": (batches[i] for i in range(2)), "steps": 2}


def _loader(x, y, weights):
    import torch

    columns = [torch.from_numpy(np.asarray(a, "float32")) for a in (x, y["p"], y["q"], weights)]
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*columns), batch_size=3)

    class Packed(torch.utils.data.DataLoader):
        def __iter__(self):
            return ((x, {"p": p, "q": q}, w) for x, p, q, w in data)

    return {"x": Packed(data.dataset, batch_size=3)}


SOURCES = {
    "arrays": _arrays,
    "PyDataset": lambda *data: {"x": _Batches(*data)},
    "generator": _generator,
    **({"tf.data": _dataset} if BACKEND == "tensorflow" else {}),
    **({"DataLoader": _loader} if BACKEND == "torch" else {}),
}


@pytest.mark.parametrize("source", SOURCES)
def test_wherever_data_come_from(source):
    x, base = inputs(), two_outputs("dict")
    y = {"p": np.ones((SIZE, 2), "float32"), "q": np.zeros((SIZE, 1), "float32")}
    model = compiled(base, loss={"p": "mse", "q": "mse"})
    logs = model.evaluate(**SOURCES[source](x, y, WEIGHTS), verbose=0, return_dict=True)
    penalty = np.mean(WEIGHTS * slopes_squared(base, x))
    np.testing.assert_allclose(logs["along_ones"], penalty, rtol=2e-3)


@pytest.mark.slow
def test_in_a_part_of_the_batch_and_in_validation():
    x, base = inputs(), two_outputs("list")
    y = [np.ones((SIZE, 2), "float32"), np.zeros((SIZE, 1), "float32")]
    nothing = [np.zeros(SIZE), np.zeros(SIZE)]
    model = compiled(base, jacobian_fraction=0.5, loss=["mse", "mse"])
    history = model.fit(x, y, sample_weight=nothing, validation_data=(x, y, nothing), verbose=0).history
    assert history["loss"] == history["along_ones"] == history["val_loss"] == history["val_along_ones"] == [0.0]


# ---------------------------------------------------------------- what else is weighed


def test_an_example_without_weight_makes_no_multiplier_grow():
    x, y = inputs(), np.zeros((SIZE, 1))
    base = keras.Sequential([keras.Input((3,)), layers.Dense(1, "tanh", kernel_initializer="ones")])
    falls = Monotone([0], increasing=False, enforcement=AugmentedLagrangian(2.0, update_every=1))
    model = compiled(base, [falls])
    model.train_on_batch(x, y, WEIGHTS)
    logs = model.test_on_batch(x, y, return_dict=True)
    slopes = np.maximum(0.0, 1 - np.tanh(x.sum(axis=1)) ** 2)
    np.testing.assert_allclose(logs["monotone/multiplier_max"], 2.0 * np.mean(WEIGHTS * slopes), rtol=1e-4)


def test_the_distances_of_a_distiller():
    x, networks = inputs(), [two_outputs("dict") for _ in range(2)]
    y = {"p": np.ones((SIZE, 2)), "q": np.zeros((SIZE, 1))}
    distiller = jvpreg.JacobianDistiller(*networks, [jvpreg.distillation.ActivationMatching(1.0)])
    distiller.compile(keras.optimizers.SGD(0.0), {"p": "mse", "q": "mse"})
    logs = distiller.evaluate(x, y, sample_weight={"p": WEIGHTS, "q": OTHER}, verbose=0, return_dict=True)
    outputs = [{key: ops.convert_to_numpy(value) for key, value in network(x).items()} for network in networks]
    distance = sum(np.sum((outputs[0][key] - outputs[1][key]) ** 2, axis=1) for key in "pq")
    np.testing.assert_allclose(logs["activation_matching"], np.mean((WEIGHTS + OTHER) / 2 * distance), rtol=1e-5)
