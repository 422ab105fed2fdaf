"""The losses by themselves, and the errors for wrong arguments and models."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg.distillation import (
    ActivationMatching,
    AttentionMatching,
    BiasJacobianMatching,
    JacobianMatching,
    MatchingLoss,
    maps,
)
from jvpreg.distillation.jacobian import angle
from tests.compare import normal, numpy
from tests.distillation.networks import all_losses, batch, distill, evaluated, student, teacher

DEGREES = [0.0, 1e-6, 0.01, 45.0, 90.0, 179.99, 180.0]


def check_angles(degrees, dtype, tolerance):
    for scale in (1.0, 1e-30, 1e30):
        a = np.array([[1.0, 0.0, 0.0]])
        b = scale * np.array([[np.cos(np.radians(degrees)), 0.0, np.sin(np.radians(degrees))]])
        received = angle(*[[ops.convert_to_tensor(v, dtype=dtype)] for v in (a, b)])
        np.testing.assert_allclose(numpy(received), [degrees], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("degrees", DEGREES)
def test_small_and_large_angles(degrees):
    check_angles(degrees, "float32", 5e-6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("degrees", DEGREES)
def test_small_and_large_angles_in_float64(degrees):
    check_angles(degrees, "float64", 1e-13)


def test_angles_of_nothing():
    zero, one = [np.zeros((1, 2))], [np.array([[3.0, 4.0]])]
    assert [float(numpy(angle(*pair))[0]) for pair in ((zero, one), (one, zero), (zero, zero))] == [90.0, 90.0, 0.0]


def test_the_angle_is_of_all_tensors_together():
    a, b = normal(2, 12), normal(2, 12, seed=1)
    parts = [[v[:, :4].reshape(2, 2, 2), v[:, 4:]] for v in (a, b)]
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(numpy(angle(*parts)), np.degrees(np.arccos(cosines)), rtol=1e-6)


def test_shrunk_maps():
    tensor = normal(2, 6, 4)
    blocks = tensor.reshape(2, 3, 2, 2, 2)
    np.testing.assert_allclose(numpy(maps.shrink(tensor, (3, 2), keep_sum=True)), blocks.sum((2, 4)), rtol=1e-5)
    np.testing.assert_allclose(numpy(maps.shrink(tensor, (3, 2), keep_sum=False)), blocks.mean((2, 4)), rtol=1e-5)
    # If one size does not divide the other, a position counts in part for each of two.
    np.testing.assert_allclose(maps.coverage(3, 2, keep_sum=True), [[1, 0], [0.5, 0.5], [0, 1]])
    np.testing.assert_allclose(maps.coverage(5, 3, keep_sum=False).sum(axis=0), np.ones(3))
    np.testing.assert_allclose(maps.coverage(5, 3, keep_sum=True).sum(axis=1), np.ones(5))
    one, other = maps.alike(normal(2, 6, 4), normal(2, 3, 8), keep_sum=True)
    assert tuple(one.shape) == tuple(other.shape) == (2, 3, 4)


@pytest.mark.usefixtures("float64")
def test_sizes_that_differ():
    x, y = batch()
    networks = teacher(), student()
    pair = [("relu1", "tanh3")]  # 8x8 and 4x4
    losses = [AttentionMatching(1.0, pair), BiasJacobianMatching(1.0, [("first", "conv3")])]
    logs = evaluated(distill(losses, networks=networks), x, y)
    fulls = [jvpreg.full_jacobian(model, x, target=y) for model in networks]
    attention = [
        np.abs(numpy(jvpreg.linearize(model, x).node_outputs()[name])).sum(-1)
        for model, name in zip(networks, pair[0], strict=True)
    ]
    bias = [numpy(full.bias_jacobians[name]).sum(-1) for full, name in zip(fulls, ("first", "conv3"), strict=True)]
    pooled = attention[0].reshape(6, 4, 2, 4, 2).mean((2, 4)), bias[0].reshape(6, 4, 2, 4, 2).sum((2, 4))
    np.testing.assert_allclose(logs["attention_matching"], ((pooled[0] - attention[1]) ** 2).sum() / 6, rtol=1e-10)
    np.testing.assert_allclose(logs["bias_jacobian_matching"], ((pooled[1] - bias[1]) ** 2).sum() / 6, rtol=1e-10)


@pytest.mark.slow
def test_pairs_by_size(capsys):
    losses = [AttentionMatching(1.0), BiasJacobianMatching(1.0, layers="auto")]
    distiller = jvpreg.JacobianDistiller(teacher(), student(), losses)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "AttentionMatching matches (teacher - student): relu1 - tanh2 (8x8), relu2 - tanh3 (4x4)",
        "BiasJacobianMatching matches (teacher - student): first - norm2 (8x8), norm - conv3 (4x4)",
    ]
    named = [
        AttentionMatching(1.0, [("relu1", "tanh2"), ("relu2", "tanh3")]),
        BiasJacobianMatching(1.0, [("first", "norm2"), ("norm", "conv3")]),
    ]
    x, y = batch()
    assert evaluated(distill(losses), x, y) == evaluated(distill(named), x, y)
    assert distiller.matching_losses[0].get_config()["layers"] == "auto"


def test_a_block_of_layers():
    x, y = batch()

    def blocked():
        block = keras.Sequential([layers.Conv2D(3, 3, activation="tanh", name="conv"), layers.BatchNormalization()])
        return keras.Sequential([keras.Input((8, 8, 2)), block, layers.Flatten(), layers.Dense(3)])

    networks = blocked(), blocked()
    names = [model.layers[0].name for model in networks]
    losses = [BiasJacobianMatching(1.0, [tuple(names)]), AttentionMatching(1.0, [tuple(names)])]
    logs = evaluated(distill(losses, networks=networks), x, y)
    full = [jvpreg.full_jacobian(model, x, target=y) for model in networks]
    sums = [
        sum(numpy(c).sum(-1) for key, c in f.bias_jacobians.items() if key.startswith(f"{name}/"))
        for f, name in zip(full, names, strict=True)
    ]
    np.testing.assert_allclose(logs["bias_jacobian_matching"], ((sums[0] - sums[1]) ** 2).sum() / 6, rtol=1e-4)
    attention = [np.abs(numpy(model.layers[0](x))).sum(-1) for model in networks]
    np.testing.assert_allclose(logs["attention_matching"], ((attention[0] - attention[1]) ** 2).sum() / 6, rtol=1e-4)


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="no convolution of channels first on a CPU")
def test_channels_first():
    def network(data_format, seed):
        shape = (8, 8, 2) if data_format == "channels_last" else (2, 8, 8)
        model = keras.Sequential(
            [
                keras.Input(shape),
                layers.Conv2D(3, 3, data_format=data_format, activation="tanh", name="conv"),
                layers.BatchNormalization(axis=1 if data_format == "channels_first" else -1, name="norm"),
                layers.ReLU(name="relu"),
                layers.GlobalAveragePooling2D(data_format=data_format),
                layers.Dense(3),
            ]
        )
        keras.utils.set_random_seed(seed)
        model.set_weights([np.random.normal(size=w.shape) ** 2 for w in model.get_weights()])
        return model

    x, y = batch()
    losses = [
        BiasJacobianMatching(1.0, [("norm", "norm"), ("conv", "conv")]),
        AttentionMatching(1.0, [("conv", "conv")]),
    ]
    logs = []
    for data_format in ("channels_last", "channels_first"):
        given = x if data_format == "channels_last" else np.moveaxis(x, -1, 1)
        logs.append(evaluated(distill(losses, networks=[network(data_format, seed) for seed in (1, 2)]), given, y))
    assert logs[0]["attention_matching"] > 1e-3
    for name in logs[0]:
        np.testing.assert_allclose(logs[1][name], logs[0][name], rtol=1e-4)


def wide():
    return keras.Sequential(
        [keras.Input((8, 8, 2)), layers.Conv2D(3, 8, name="all"), layers.Flatten(), layers.Dense(3)]
    )


def sharing():
    shared = teacher()
    return shared, keras.Sequential([keras.Input((8, 8, 2)), *shared.layers])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActivationMatching(-1.0), "`weight` of ActivationMatching. Expected a finite number, 0 or more"),
        (lambda: ActivationMatching(1.0, temperature=0), "`temperature`. Expected a finite number above 0, or None"),
        (lambda: JacobianMatching(1.0, target="all"), '`target`. Expected "label", "predicted" or None.*target=.all.'),
        (lambda: JacobianMatching(1.0, num_probes=0), "`num_probes`. Expected an integer, 1 or more"),
        (lambda: JacobianMatching(1.0, "label", num_probes=2), "None beside `target`, which is .label..*num_probes=2"),
        (lambda: BiasJacobianMatching(1.0, target=None), '`target`. Expected "label" or "predicted"'),
        (lambda: BiasJacobianMatching(1.0, "first"), "`layers` of BiasJacobianMatching. Expected a list of pairs"),
        (lambda: AttentionMatching(1.0, ["a", "b"]), r"`layers` of AttentionMatching.*layers=\['a', 'b'\]"),
        (lambda: AttentionMatching(1.0, []), "Expected a list of pairs of paths"),
        (lambda: distill([]), "`losses`. Expected a list of losses"),
        (lambda: distill(["mse"]), "`losses`. Expected a list of losses"),
        (lambda: distill([ActivationMatching(1.0)] * 2), "`losses`. Expected names that differ"),
        (lambda: distill([ActivationMatching(1.0, name="loss")]), "`losses`. Expected names that differ"),
        (
            lambda: distill([JacobianMatching(1.0), ActivationMatching(1.0, name="jacobian_matching_angle")]),
            "`losses`. Expected names that differ",
        ),
        (lambda: distill([AttentionMatching(1.0, [("relu9", "tanh2")])]), "of the teacher: .*Received: 'relu9'"),
        (lambda: distill([AttentionMatching(1.0, [("relu1", "tanh9")])]), "of the student: .*Received: 'tanh9'"),
        (lambda: distill([AttentionMatching(1.0, [("logits", "tanh2")])]), "positions and channels.*'logits' of the t"),
        (
            lambda: distill([BiasJacobianMatching(1.0, [("second", "conv3")])]),
            "'second' of the teacher.*use_bias=False",
        ),
        (lambda: distill([BiasJacobianMatching(1.0, [("logits", "conv3")])]), r"as many axes.*\(\) and.*\(4, 4\)"),
        (lambda: distill([AttentionMatching(1.0)], networks=(teacher(), wide())), '"auto" found no spatial size'),
        (lambda: distill([ActivationMatching(1.0)], networks=(teacher(), None)), "`student`. Expected a plain Keras"),
        (
            lambda: distill([ActivationMatching(1.0)], networks=("model", student())),
            "`teacher`. Expected a plain Keras",
        ),
        (
            lambda: distill([ActivationMatching(1.0)], networks=sharing()),
            "`student`. Expected a model with variables of",
        ),
        (
            lambda: distill([ActivationMatching(1.0)], networks=(teacher(), student(outputs=4))),
            r"`student`. Expected outputs like the teacher's: \[\(3,\)\]. Received: \[\(4,\)\]",
        ),
        (
            lambda: distill([ActivationMatching(1.0)], networks=(keras.Sequential([layers.Dense(3)]), student())),
            "`teacher`. Expected a built model",
        ),
        (
            lambda: distill([AttentionMatching(1.0)], networks=(teacher(), keras.Sequential([layers.Dense(3)]))),
            "`student`. Expected a built model with inputs of known shape",
        ),
        (
            lambda: distill([ActivationMatching(1.0)], networks=(teacher(), jvpreg.JacobianModel(student()))),
            "`student`. Expected a plain Keras model",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_student_with_penalties_inside():
    penalized = jvpreg.layers.JacobianPenalty(layers.Dense(3), [jvpreg.regularizers.JacobianNorm(0.1)])
    model = keras.Sequential([keras.Input((8, 8, 2)), layers.Flatten(), penalized])
    with pytest.raises(ValueError, match="without JacobianPenalty layers"):
        distill([ActivationMatching(1.0)], networks=(teacher(), model))


def test_token_ids_have_no_jacobian():
    """Bias-Jacobians they have."""

    def network():
        last = layers.Dense(2, name="last")
        return keras.Sequential([keras.Input((4,), dtype="int32"), layers.Embedding(9, 2), layers.Flatten(), last])

    networks, data = (network(), network()), (np.ones((3, 4), "int32"), np.zeros(3, "int32"))
    for num_probes in (None, 1):
        distiller = distill([JacobianMatching(1.0, num_probes=num_probes)], networks=networks)
        with pytest.raises(ValueError, match=r"`losses`. Expected .* `jacobian_matching` \(JacobianMatching\), which"):
            distiller.train_on_batch(*data)
    distiller = distill([BiasJacobianMatching(1.0, [("last", "last")])], networks=networks)
    assert np.isfinite(distiller.train_on_batch(*data, return_dict=True)["bias_jacobian_matching"])


def test_labels_that_are_missing():
    x, _ = batch()
    distiller = jvpreg.JacobianDistiller(teacher(), student(), [JacobianMatching(1.0)])
    distiller.compile("sgd")
    with pytest.raises(ValueError, match=r'Use target="predicted" where there are none'):
        distiller.train_on_batch(x)


def test_without_labels():
    x, _ = batch()
    distiller = jvpreg.JacobianDistiller(
        teacher(), student(), [ActivationMatching(1.0), JacobianMatching(1.0, "predicted")]
    )
    distiller.compile("sgd")
    assert distiller.train_on_batch(x, return_dict=True)["jacobian_matching_angle"] > 0


@pytest.mark.slow
def test_a_student_that_was_given_no_input_shape():
    x, y = batch()
    model = keras.Sequential([layers.Flatten(), layers.Dense(3)])
    distiller = distill([ActivationMatching(1.0), JacobianMatching(1.0)], networks=(teacher(), model))
    assert distiller.fit(x, y, verbose=0).history["jacobian_matching"][0] > 0


@pytest.mark.slow
def test_a_teacher_that_is_a_jacobian_model():
    x, y = batch()
    losses = [JacobianMatching(1.0), AttentionMatching(1.0, [("relu1", "tanh2")])]
    wrapped = distill(losses, networks=(jvpreg.JacobianModel(teacher()), student()))
    assert evaluated(wrapped, x, y) == evaluated(distill(losses), x, y)


@keras.saving.register_keras_serializable(package="test_distillation")
class LabelMatching(MatchingLoss):
    """A loss of the user's own, on the logit of the label, in units of the image's mean."""

    def see(self, view, sites, directions):
        chosen = ops.sum(view.outputs[0] * ops.one_hot(ops.cast(view.labels, "int32"), 3), axis=-1)
        return [chosen, ops.mean(view.linearization.inputs[0], axis=(1, 2, 3))]

    def distance(self, teacher, student):
        return (teacher[0] - student[0]) ** 2 * student[1] ** 2


def test_a_loss_of_one_s_own():
    x, y = batch()
    networks = teacher(), student()
    distiller = distill([LabelMatching(1.0)], networks=networks)
    g, f = (numpy(model(x))[np.arange(6), y] for model in networks)
    expected = ((g - f) ** 2 * x.mean(axis=(1, 2, 3)) ** 2).mean()
    np.testing.assert_allclose(evaluated(distiller, x, y)["label_matching"], expected, rtol=1e-4)
    cached = distiller.with_teacher(x, y)
    np.testing.assert_allclose(evaluated(distiller, cached, y)["label_matching"], expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    x, y = batch()
    exact = evaluated(distill(all_losses()), x, y)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        logs = evaluated(distill(all_losses()), x, y)
    finally:
        keras.config.set_dtype_policy(before)
    for name, value in exact.items():
        np.testing.assert_allclose(logs[name], value, rtol=0.1, err_msg=name)
    assert logs["jacobian_matching"] != exact["jacobian_matching"]
