"""`JacobianGuard`: which faults it notices, in which layer it says that they began, and that it is silent otherwise."""

import math

import keras
import numpy as np
import pytest
from keras import layers

import jvpreg
from jvpreg.callbacks import JacobianGuard, JacobianProbe
from tests.callbacks.fitting import NeverBegins, Scale, data, fit, make_model, still_model

FROZEN = "ignore:The model does not have any trainable weights"


@pytest.mark.parametrize(
    ("kind", "factor", "words"),
    [
        ("explosion", 50.0, "exploded: .* against .* before. It began in `last`: it stretched random tangents by"),
        ("collapse", 1e-3, "collapsed: .* against .* before. It began in `last`: it stretched"),
        (
            "non-finite",
            math.nan,
            "is not finite: nan against .* before. It began in `last`: its weights are not finite",
        ),
    ],
)
def test_it_stops_and_says_where(kind, factor, words):
    probe = JacobianProbe(data(4)[0], ["frobenius_norm"])
    guard = JacobianGuard(probe)
    with pytest.warns(UserWarning, match=f"Epoch 3: `jacobian/frobenius_norm` {words}.* Training stops"):
        history = fit(still_model(), Scale("last", {2: factor}), probe, guard, epochs=5).history
    assert len(history["loss"]) == 3
    (event,) = guard.events
    assert (event.kind, event.epoch, event.batch, event.layer) == (kind, 2, None, "last")
    assert event.reference == pytest.approx(np.median(history["jacobian/frobenius_norm"][:2]))


@pytest.mark.slow
def test_it_warns_once_for_each_time_and_goes_on():
    probe = JacobianProbe(data(4)[0])
    guard = JacobianGuard(probe, "spectral_norm", action="warn")
    factors = {1: 100.0, 3: 0.01, 5: 0.01, 6: 1e4, 7: 0.01}
    with pytest.warns(UserWarning, match="`jacobian/spectral_norm`") as warned:
        history = fit(still_model(), Scale("last", factors), probe, guard, epochs=8).history
    assert len(history["loss"]) == 8
    assert [(event.kind, event.epoch) for event in guard.events] == [
        ("explosion", 1),
        ("collapse", 5),
        ("explosion", 6),
    ]
    # The reference comes from the healthy epochs alone, so it is the same for all three events.
    assert len({round(event.reference, 3) for event in guard.events}) == 1
    assert len([w for w in warned if "jacobian/spectral_norm" in str(w.message)]) == 3


@pytest.mark.slow
def test_a_healthy_run_is_left_alone():
    probe = JacobianProbe(data(4)[0], ["frobenius_norm"], every_epochs=2)
    guard = JacobianGuard(probe)
    history = fit(make_model(wrapped=True), probe, guard, epochs=4).history  # Pytest makes a warning an error.
    # The epoch that is not measured has NaN in the logs, and the guard makes no event of it.
    assert math.isnan(history["jacobian/frobenius_norm"][2])
    assert guard.events == []


def test_batches_are_guarded_too():
    probe = JacobianProbe(data(4)[0], ["frobenius_norm"], every_batches=1)
    guard = JacobianGuard(probe)

    class Break(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 1:
                layer = self.model.get_layer("last")
                layer.set_weights([100 * weight for weight in layer.get_weights()])

    with pytest.warns(UserWarning, match="Epoch 1, batch 2: .* began in `last`"):
        history = fit(still_model(), Break(), probe, guard, epochs=2).history
    assert len(history["loss"]) == 1
    assert [(event.epoch, event.batch) for event in guard.events] == [(0, 1)]


@pytest.mark.filterwarnings(FROZEN)
def test_the_first_layer_is_found_where_the_nonlinearity_hides_it():
    """An overflow in a residual block. Neither the output of a ReLU nor its tangent shows it."""
    x = keras.Input((6,))
    y = layers.Dense(5, activation="relu", name="stem")(x)
    z = layers.Rescaling(1.0, name="overflow")(y)
    model = keras.Model(x, layers.Dense(3, name="head")(layers.Add(name="sum")([y, z])))
    model.trainable = False
    model.compile("sgd", make_model().loss)
    head = model.get_layer("head")
    head.set_weights([head.get_weights()[0], np.full(3, np.inf, "float32")])
    probe = JacobianProbe(data(4)[0], ["frobenius_norm"])
    guard = JacobianGuard(probe)
    with pytest.warns(UserWarning, match="is not finite: nan. It began in `head`: its weights are not finite"):
        fit(model, probe, guard)
    model.get_layer("stem").set_weights([np.full((6, 5), 1e38, "float32"), np.full(5, 1e38, "float32")])
    with pytest.warns(UserWarning, match="It began in `(stem|stem/activation)`: its output is not finite"):
        fit(model, probe, guard)


@pytest.mark.filterwarnings(FROZEN)
def test_of_token_ids_only_what_is_not_finite_has_a_place():
    tokens = keras.Input((4,), dtype="int32")
    y = layers.Embedding(7, 3, name="embedding")(tokens)
    model = keras.Model(tokens, layers.Dense(2, name="last")(layers.Flatten()(y)))
    model.trainable = False
    model.compile("sgd", "mse")
    x = np.arange(24).reshape(6, 4) % 7
    metrics = {"norm": lambda lin: jvpreg.estimators.frobenius_norm(lin.after("embedding"))}
    probe = JacobianProbe(x, metrics)
    guard = JacobianGuard(probe, "norm")
    fitting = {"x": x, "y": np.ones((6, 2)), "verbose": 0, "epochs": 3}
    with pytest.warns(UserWarning, match="exploded: .* before. No layer stands out"):
        model.fit(callbacks=[Scale("last", {1: 100.0}), probe, guard], **fitting)
    with pytest.warns(UserWarning, match="It began in `last`: its weights are not finite"):
        model.fit(callbacks=[Scale("last", {1: math.nan}), probe, guard], **fitting)


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch runs it each time")
def test_it_is_compiled_once(monkeypatch):
    traces, counts = [], []

    def linearize(*args, **kwargs):
        traces.append(1)
        return jvpreg.linearize(*args, **kwargs)

    monkeypatch.setattr("jvpreg.callbacks.measurement.linearize", linearize)
    probe = JacobianProbe(data(4)[0], ["frobenius_norm"])
    count = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: counts.append(len(traces)))
    model, guard = make_model(), JacobianGuard(probe)
    fit(model, probe, guard, count, epochs=3)
    fit(model, probe, guard, count, epochs=1)
    assert 0 < counts[0] <= 5
    assert set(counts) == {counts[0]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"explosion": 1.0}, "`explosion`. Expected a number above 1. Received: explosion=1.0"),
        ({"collapse": 1}, "`collapse`"),
        ({"window": 0}, "`window`"),
        ({"action": "raise"}, '`action`. Expected "stop" or "warn". Received: action=\'raise\''),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match="Invalid value for argument") as raised:
        JacobianGuard(JacobianProbe(data(4)[0]), **arguments)
    assert message in str(raised.value)


def test_what_it_cannot_guard_is_told_before_training_begins():
    probe = JacobianProbe(data(4)[0], ["frobenius_norm"])
    with pytest.raises(
        ValueError, match=r"`monitor`. Expected a metric that the probe measures: .'frobenius_norm', .*'trace'"
    ):
        fit(make_model(), probe, JacobianGuard(probe, "trace"), NeverBegins())
    with pytest.raises(ValueError, match="reads a `JacobianProbe` that is not in `callbacks`"):
        fit(make_model(), JacobianGuard(JacobianProbe(data(4)[0])), NeverBegins())


@pytest.mark.slow
def test_a_guard_before_its_probe_is_warned_of():
    probe, other = (JacobianProbe(data(4)[0], ["frobenius_norm"], prefix=prefix) for prefix in ("jacobian", "other"))
    with pytest.warns(UserWarning, match="JacobianGuard stands before JacobianProbe"):
        fit(make_model(), JacobianGuard(probe), probe)
    fit(make_model(), probe, JacobianGuard(probe), other)  # A warning would be an error.
