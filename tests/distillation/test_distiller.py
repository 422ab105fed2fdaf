"""`JacobianDistiller` against closed forms, the full-Jacobian and finite differences."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg.distillation import ActivationMatching, AttentionMatching, BiasJacobianMatching, JacobianMatching
from tests.compare import normal, numpy
from tests.distillation.networks import all_losses, batch, compiled, distill, evaluated, step, student, teacher

COMPILATIONS = {
    "tensorflow": [{"jit_compile": False}, {"jit_compile": True}],
    "jax": [{"jit_compile": True}],
    "torch": [{"jit_compile": False}],
}[keras.backend.backend()]


def linear(seed):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((4,)), layers.Dense(3, name="dense", bias_initializer="normal")])


@pytest.mark.slow
@pytest.mark.parametrize("make", [teacher, student])
def test_a_student_equal_to_its_teacher_has_no_distance(make):
    x, y = batch()
    paths = [("first", "first")] if make is teacher else [("conv2", "conv2"), ("conv1", "conv1")]
    losses = [*all_losses(pairs=paths, maps=paths), keras.distillation.LogitsDistillation()]
    logs = evaluated(distill(losses, networks=(make(), make())), x, y)
    plain = logs.pop("loss")
    assert plain > 0.1
    assert len(logs) == 10
    assert {key for key in logs if key.endswith("_angle")} == {"jacobian_matching_angle", "probed_angle"}
    np.testing.assert_allclose(list(logs.values()), 0.0, atol=1e-12)


def expected(networks, x, y, target):
    """The distances of `all_losses` but for the probed one, from the full-Jacobians, by numpy."""
    fulls = [jvpreg.full_jacobian(model, x, target=target) for model in networks]
    lins = [jvpreg.linearize(model, x) for model in networks]
    g, f = (numpy(full.outputs).astype("float64") for full in fulls)
    soft = [np.exp(z / 2) / np.exp(z / 2).sum(1, keepdims=True) for z in (g, f)]
    jacobians = [numpy(full.input_jacobian).reshape(len(x), -1) for full in fulls]
    bias = [{name: numpy(c).sum(-1) for name, c in full.bias_jacobians.items()} for full in fulls]
    small = bias[0]["norm"] - bias[1]["conv3"]
    maps = [numpy(lin.node_outputs()[name]) for lin, name in zip(lins, ("relu1", "tanh2"), strict=True)]
    squares = [(m**2).sum(-1) / np.linalg.norm((m**2).sum(-1), axis=(1, 2))[:, None, None] for m in maps]
    cosine = (jacobians[0] * jacobians[1]).sum(1) / np.prod([np.linalg.norm(j, axis=1) for j in jacobians], axis=0)
    return {
        "activation_matching": ((g - f) ** 2).sum(1).mean(),
        "softened": 4 * (soft[0] * np.log(soft[0] / soft[1])).sum(1).mean(),
        "jacobian_matching": ((jacobians[0] - jacobians[1]) ** 2).sum(1).mean(),
        "jacobian_matching_angle": np.degrees(np.arccos(cosine)).mean(),
        "bias_jacobian_matching": (((bias[0]["first"] - bias[1]["conv2"]) ** 2).sum() + (small**2).sum()) / len(x),
        "attention_matching": ((np.abs(maps[0]).sum(-1) - np.abs(maps[1]).sum(-1)) ** 2).sum() / len(x),
        "normalized": ((squares[0] - squares[1]) ** 2).sum() / len(x),
    }


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("target", ["label", "predicted"])
def test_the_distances_and_the_loss(target):
    x, y = batch()
    networks = (teacher(), student())
    targets = y if target == "label" else numpy(networks[0](x)).argmax(1)
    assert target == "label" or (targets != y).any()
    losses = all_losses(target)
    logs = evaluated(distill(losses, networks=networks), x, y)
    for name, value in expected(networks, x, y, targets).items():
        assert value > 1e-3
        np.testing.assert_allclose(logs[name], value, rtol=1e-9, err_msg=name)
    plain = ops.mean(keras.losses.sparse_categorical_crossentropy(y, networks[1](x), from_logits=True))
    total = numpy(plain) + sum(loss.weight * logs[loss.name] for loss in losses)
    np.testing.assert_allclose(logs["loss"], total, rtol=1e-9)


@pytest.mark.usefixtures("float64")
def test_a_linear_teacher_and_student():
    networks, x, y = (linear(1), linear(2)), normal(5, 4), np.array([0, 1, 2, 1, 0])
    losses = [
        ActivationMatching(1.0),
        JacobianMatching(1.0),
        BiasJacobianMatching(1.0, layers=[("dense", "dense")]),
    ]
    logs = evaluated(distill(losses, networks=networks), x, y)
    (w, b), (v, c) = (model.get_weights() for model in networks)
    np.testing.assert_allclose(logs["activation_matching"], ((x @ (w - v) + b - c) ** 2).sum() / 5, rtol=1e-12)
    np.testing.assert_allclose(logs["jacobian_matching"], ((w - v)[:, y] ** 2).sum() / 5, rtol=1e-12)
    np.testing.assert_allclose(logs["bias_jacobian_matching"], ((b - c)[y] ** 2).sum() / 5, rtol=1e-12)
    cosines = (w * v).sum(0) / np.linalg.norm(w, axis=0) / np.linalg.norm(v, axis=0)
    np.testing.assert_allclose(logs["jacobian_matching_angle"], np.degrees(np.arccos(cosines))[y].mean(), rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_random_directions_have_the_frobenius_norm_for_their_mean():
    networks, x, y = (linear(1), linear(2)), normal(5, 4), np.zeros(5)
    distiller = distill([JacobianMatching(1.0, num_probes=800)], networks=networks)
    values = [evaluated(distiller, x, y)["jacobian_matching"] for _ in range(3)]
    assert len(set(values)) == 3  # each call draws new directions
    difference = networks[0].get_weights()[0] - networks[1].get_weights()[0]
    # 12,000 probes; the variance of one is at most 2‖J‖_F⁴.
    np.testing.assert_allclose(np.mean(values), (difference**2).sum(), rtol=4 * np.sqrt(2 / 12_000))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("index", range(7))
def test_the_weight_gradient_is_that_of_finite_differences(index):
    x, y = batch()
    loss = all_losses()[index]
    distiller = distill([loss], optimizer=1.0)
    weights = distiller.student.get_weights()
    trainable = [v.trainable for v in distiller.student.weights]
    seeds = [numpy(state) for state in distiller.seed_states()]

    def loss_at(values):
        distiller.student.set_weights(values)
        for state, value in zip(distiller.seed_states(), seeds, strict=True):
            state.assign(value)  # the same directions each time
        return float(step(distiller, x, y)["loss"])

    loss_at(weights)
    moved = [before - after for before, after in zip(weights, distiller.student.get_weights(), strict=True)]
    directions = [normal(*w.shape, seed=i) * t for i, (w, t) in enumerate(zip(weights, trainable, strict=True))]
    size = 1e-6
    ahead, behind = (
        loss_at([w + sign * size * d for w, d in zip(weights, directions, strict=True)]) for sign in (1, -1)
    )
    slope = sum(np.sum(m * d) for m, d in zip(moved, directions, strict=True))
    np.testing.assert_allclose((ahead - behind) / (2 * size), slope, rtol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("compilation", COMPILATIONS, ids=str)
def test_it_learns_and_the_teacher_stays(compilation):
    x, y = batch()
    losses = [
        ActivationMatching(1.0),
        JacobianMatching(10.0),
        BiasJacobianMatching(0.1, layers=[("norm", "conv3")]),
        AttentionMatching(10.0, layers=[("relu1", "tanh2")], normalized=True),
    ]
    networks = (teacher(), student(normalized=False))
    before, first = networks[0].get_weights(), networks[1].get_weights()
    distiller = distill(losses, keras.optimizers.Adam(0.02), networks=networks, **compilation)
    history = distiller.fit(x, y, epochs=20, verbose=0, validation_data=(x, y)).history
    parts = {
        "activation_matching": 0.5,
        "jacobian_matching": 0.5,
        "bias_jacobian_matching": 0.5,
        "attention_matching": 1.0,
    }
    for name, part in parts.items():
        assert history[name][-1] < part * history[name][0], name
        assert history[f"val_{name}"][-1] < part * history[name][0], name
    assert history["val_jacobian_matching_angle"][-1] < history["jacobian_matching_angle"][0] - 3
    for one, other in zip(before, distiller.teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert any(np.any(a != b) for a, b in zip(first, distiller.student.get_weights(), strict=True))
    assert {id(v) for v in distiller.trainable_variables} == {id(v) for v in distiller.student.trainable_variables}


def test_each_network_runs_once_and_is_pulled_back_once(monkeypatch):
    runs, pulls = [], []

    def linearize(model, *args, **kwargs):
        runs.append(model.name)
        return jvpreg.linearize(model, *args, **kwargs)

    def pull_back(*args):
        pulls.append(1)
        return original(*args)

    original = jvpreg.linearization.pull_back
    x, y = batch()
    distiller = distill(all_losses(), run_eagerly=keras.backend.backend() != "jax")
    for module in ("training.penalized_model", "distillation.distiller"):
        monkeypatch.setattr(f"jvpreg.{module}.linearize", linearize)
    monkeypatch.setattr("jvpreg.linearization.pull_back", pull_back)
    moving = numpy(distiller.student.get_layer("norm2").moving_mean) + 0
    distiller.train_on_batch(x, y)
    assert sorted(runs) == sorted([distiller.teacher.name, distiller.student.name])
    assert len(pulls) == 2
    mean = numpy(jvpreg.linearize(distiller.student, x).node_outputs()["conv2"]).mean(axis=(0, 1, 2))
    moved = numpy(distiller.student.get_layer("norm2").moving_mean)
    np.testing.assert_allclose(moved, 0.99 * moving + 0.01 * mean, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_sample_weights_weigh_the_distances():
    x, y = batch()
    losses = [*all_losses(), keras.distillation.LogitsDistillation(2.0)]
    losses = [loss for loss in losses if getattr(loss, "num_probes", None) is None]
    networks = (teacher(), student())
    each = [evaluated(distill(losses, networks=networks), x[[i]], y[[i]]) for i in range(len(x))]
    weights = np.array([0.0, 2.0, 1.0, 0.5, 0.0, 3.0])
    logs = evaluated(distill(losses, networks=networks), x, y, sample_weight=weights)
    for name in [*(loss.name for loss in losses[:-1]), "logits_distillation"]:
        value = np.mean([w * one[name] for w, one in zip(weights, each, strict=True)])
        np.testing.assert_allclose(logs[name], value, rtol=1e-9, err_msg=name)
    # Keras divides the compiled loss by the number of examples, as it does the distances.
    value = np.mean([w * one["loss"] for w, one in zip(weights, each, strict=True)])
    np.testing.assert_allclose(logs["loss"], value, rtol=1e-9)


@pytest.mark.slow
def test_losses_of_keras_are_those_of_its_own_distiller():
    x, y = batch()
    own = [
        keras.distillation.LogitsDistillation(3.0),
        keras.distillation.FeatureDistillation("mse", teacher_layer_name="relu2", student_layer_name="to_five"),
    ]

    def networks():
        pooled = layers.Conv2D(5, 1, name="to_five", kernel_initializer="ones")
        logits = layers.Dense(3, kernel_initializer="ones")
        beginning = student(normalized=False).layers[:4]
        return teacher(), keras.Sequential([keras.Input((8, 8, 2)), *beginning, pooled, layers.Flatten(), logits])

    theirs = keras.distillation.Distiller(*networks(), own, student_loss_weight=0.0)
    theirs.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    expected = evaluated(theirs, x, y)["distillation_loss"]
    logs = evaluated(distill(own, networks=networks()), x, y)
    np.testing.assert_allclose(logs["logits_distillation"] + logs["feature_distillation"], expected, rtol=1e-5)


def test_activation_matching_in_the_distiller_of_keras():
    x, y = batch()
    theirs = keras.distillation.Distiller(teacher(), student(), [ActivationMatching(0.5)], student_loss_weight=0.0)
    theirs.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    logs = evaluated(distill([ActivationMatching(0.5)]), x, y)
    received = evaluated(theirs, x, y)["distillation_loss"]
    np.testing.assert_allclose(received, 0.5 * logs["activation_matching"], rtol=1e-5)
    with pytest.raises(ValueError, match=r"Use `jvpreg\.JacobianDistiller`"):
        keras.distillation.Distiller(teacher(), student(), [JacobianMatching(0.5)])


@pytest.mark.slow
def test_losses_of_the_model_itself_are_kept():
    x, y = batch()

    def regularized(kind):
        model = student(normalized=False)
        config = model.get_layer("conv1").get_config()
        first = layers.Conv2D.from_config({**config, kind: "l2"})
        copy = keras.Sequential([keras.Input((8, 8, 2)), first, *model.layers[1:]])
        copy.set_weights(model.get_weights())
        return copy

    def plain():
        return student(normalized=False)

    matching = [ActivationMatching(1.0)]
    without = step(distill(matching, networks=(teacher(), plain())), x, y)["loss"]
    of_plain_teacher = step(distill(matching, networks=(plain(), student())), x, y)["loss"]
    for kind in ("kernel_regularizer", "activity_regularizer"):
        losses = [evaluated(compiled(model), x, y)["loss"] for model in (regularized(kind), plain())]
        assert losses[0] - losses[1] > 1e-3
        distiller = distill(matching, networks=(teacher(), regularized(kind)))
        received = [step(distiller, x, y)["loss"] for _ in range(2)]
        np.testing.assert_allclose(received, without + losses[0] - losses[1], rtol=1e-4)
        # The losses of the teacher's own regularizers do not count.
        distiller = distill(matching, networks=(regularized(kind), student()))
        received = [step(distiller, x, y)["loss"] for _ in range(2)]
        np.testing.assert_allclose(received, of_plain_teacher, rtol=1e-5)


@pytest.mark.slow
def test_with_jacobian_regularizers():
    x, y = batch()
    regularizers = [jvpreg.regularizers.FullJacobianNorm(0.1)]
    alone = evaluated(compiled(jvpreg.JacobianModel(student()), jacobian_regularizers=regularizers), x, y)
    distiller = distill(all_losses()[:1], jacobian_regularizers=regularizers, jacobian_interval=2)
    logs = evaluated(distiller, x, y)
    np.testing.assert_allclose(logs["full_jacobian_norm_squared"], alone["full_jacobian_norm_squared"], rtol=1e-5)
    np.testing.assert_allclose(logs["loss"], alone["loss"] + 0.5 * logs["activation_matching"], rtol=1e-5)
    history = distiller.fit(x, y, epochs=4, verbose=0).history
    assert np.isfinite(history["activation_matching"]).all()
    np.testing.assert_array_equal(np.isnan(history["full_jacobian_norm_squared"]), [False, True, False, True])
    with pytest.raises(ValueError, match=r"argument `jacobian_regularizers`. Expected names that differ.* 'softened'"):
        distill(all_losses(), jacobian_regularizers=[jvpreg.regularizers.JacobianNorm(0.1, name="softened")])


@pytest.mark.slow
def test_a_weight_of_zero_reports_only():
    x, y = batch()
    alone, measured = (distill([ActivationMatching(1.0), *more], 0.1) for more in ([], [JacobianMatching(0.0)]))
    logs = step(alone, x, y), step(measured, x, y)
    np.testing.assert_allclose(logs[0]["loss"], logs[1]["loss"], rtol=1e-6)
    assert 0 < logs[1]["jacobian_matching_angle"] < 180
    for one, other in zip(alone.student.get_weights(), measured.student.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_evaluation_can_leave_the_distances_out():
    x, y = batch()
    distiller = distill(all_losses(), jacobian_evaluate=False)
    assert set(evaluated(distiller, x, y)) == {"loss"}
    assert "jacobian_matching_angle" in step(distiller, x, y)


def test_a_distance_that_is_not_finite_is_named():
    x, y = batch()
    distiller = distill([ActivationMatching(1.0)])
    x[0] = np.inf
    with pytest.raises(FloatingPointError, match=r"`activation_matching` was not finite at training step 1"):
        distiller.fit(x, y, verbose=0)


def test_without_a_loss_an_evaluation_can_leave_the_distances_out():
    x, _ = batch()
    distiller = jvpreg.JacobianDistiller(teacher(), student(), [ActivationMatching(1.0)])
    distiller.compile(keras.optimizers.SGD(0.0), jacobian_evaluate=False)
    assert distiller.fit(x, verbose=0).history["loss"][0] > 1e-3
    assert distiller.evaluate(x, verbose=0, return_dict=True) == {"loss": 0}


@pytest.mark.parametrize("name", ["mae", "val_loss"])
def test_a_loss_with_a_name_that_the_logs_have_already(name):
    with pytest.raises(ValueError, match=f"or a matching loss.*name='{name}'"):
        distill([ActivationMatching(1.0, name=name)], metrics=["mae"])


def test_regularizers_that_are_no_list():
    with pytest.raises(ValueError, match=r"argument `jacobian_regularizers`. Expected a list"):
        distill(all_losses()[:1], jacobian_regularizers=jvpreg.regularizers.JacobianNorm(0.1))
