"""The teacher's products, computed once for all epochs."""

import keras
import numpy as np
import pytest

import jvpreg
from jvpreg.distillation import ActivationMatching, JacobianMatching
from tests.compare import numpy
from tests.distillation.networks import all_losses, batch, compiled, distill, evaluated, student, teacher


def cacheable(target):
    return [loss for loss in all_losses(target) if not loss.draws]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["label", "predicted"])
def test_it_trains_as_with_the_teacher_beside_it(target, monkeypatch):
    x, y = batch()
    beside, cached = (distill(cacheable(target), optimizer=1e-3) for _ in range(2))
    data = cached.with_teacher(x, y if target == "label" else None, batch_size=4)
    runs = []

    def linearize(model, *args, **kwargs):
        runs.append(model.name)
        return jvpreg.linearize(model, *args, **kwargs)

    for module in ("training.penalized_model", "distillation.distiller"):
        monkeypatch.setattr(f"jvpreg.{module}.linearize", linearize)
    fit = {"epochs": 3, "batch_size": 2, "verbose": 0, "shuffle": True}
    histories = []
    for distiller, given in ((beside, x), (cached, data)):
        keras.utils.set_random_seed(7)
        runs.clear()
        histories.append(distiller.fit(given, y, validation_data=(given, y), **fit).history)
        assert (distiller.teacher.name in runs) == (distiller is beside)
    assert len(histories[0]) == 16
    for name, values in histories[0].items():
        np.testing.assert_allclose(histories[1][name], values, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(cached.predict(data, verbose=0), numpy(cached.student(x)), rtol=1e-4, atol=1e-5)


def test_what_is_cached():
    x, _ = batch()
    data = distill(cacheable("predicted")).with_teacher(x)
    shapes = {name: tuple(array.shape) for name, array in data["teacher_products"].items()}
    assert shapes == {
        "activation_matching/0": (6, 3),
        "softened/0": (6, 3),
        "jacobian_matching/0": (6, 8, 8, 2),
        "bias_jacobian_matching/0": (6, 8, 8),
        "bias_jacobian_matching/1": (6, 4, 4),
        "attention_matching/0": (6, 8, 8),
        "normalized/0": (6, 8, 8),
        "predicted": (6, 3),
    }
    assert data["inputs"] is x


@pytest.mark.slow
def test_several_inputs():
    def network(seed):
        keras.utils.set_random_seed(seed)
        inputs = {"a": keras.Input((2,), name="a"), "b": keras.Input((3,), name="b")}
        joined = keras.layers.Concatenate()([inputs["a"], inputs["b"]])
        return keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Dense(4, "tanh")(joined)))

    x, y = {"a": np.ones((4, 2), "float32"), "b": np.ones((4, 3), "float32")}, np.array([0, 1, 1, 0])
    losses = [JacobianMatching(1.0)]
    distiller = compiled(jvpreg.JacobianDistiller(network(1), network(2), losses))
    logs = evaluated(distiller, x, y)
    full = [jvpreg.full_jacobian(model, x, target=y).input_jacobian for model in (distiller.teacher, distiller.student)]
    value = sum(np.sum((numpy(g) - numpy(f)) ** 2) for g, f in ((full[0][k], full[1][k]) for k in x)) / 4
    np.testing.assert_allclose(logs["jacobian_matching"], value, rtol=1e-5)
    cached = distiller.evaluate(distiller.with_teacher(x, y), y, verbose=0, return_dict=True)
    np.testing.assert_allclose(cached["jacobian_matching"], value, rtol=1e-5)
    probed = compiled(jvpreg.JacobianDistiller(network(1), network(2), [JacobianMatching(1.0, num_probes=3)]))
    assert 0 < evaluated(probed, x, y)["jacobian_matching"] < 10 * value


def test_random_directions_cannot_be_cached():
    x, y = batch()
    with pytest.raises(ValueError, match=r"losses with random directions: \['probed'\]"):
        distill(all_losses()).with_teacher(x, y)


def test_products_of_another_distiller():
    x, y = batch()
    data = distill([ActivationMatching(1.0)]).with_teacher(x)
    with pytest.raises(ValueError, match=r"as this distiller's `with_teacher` returns them.*`jacobian_matching`"):
        compiled(jvpreg.JacobianDistiller(teacher(), student(), [JacobianMatching(1.0)])).train_on_batch(data, y)
