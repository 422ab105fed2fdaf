"""Cases that `tests/test_distribution.py` runs on one device and on several, which are made of the CPU.

`python -m tests.distributed FILE` writes the differences between both, by case, as JSON.
"""

import functools
import json
import sys
import traceback

import keras
import numpy as np
from keras import layers, ops

import jvpreg
from jvpreg import constraints, distillation, regularizers
from jvpreg.constraints import AugmentedLagrangian, Box, Penalty

REPLICAS = 2 if keras.backend.backend() == "tensorflow" else 4
BATCH = 8

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(2 * BATCH, 3)).astype("float32")
ONE_HOT = np.eye(3, dtype="float32")[RANDOM.integers(0, 3, 2 * BATCH)]
DIRECTIONS = RANDOM.normal(size=(2, 3)).astype("float32")
BOX = Box(-1.0, 1.0, num_points=BATCH)
GROWING = {"enforcement": AugmentedLagrangian(2.0, update_every=2)}
FIXED = {"enforcement": Penalty(0.3)}


def slopes_beyond(inputs, outputs, products):
    return ops.relu(ops.abs(products[0]) - 0.1)


# All rows are trained together, in one model. Each has its own metric and its own carried state.
ROWS = {
    "JacobianNorm": lambda name: (
        [
            regularizers.JacobianNorm(0.1, num_probes=2, probes=kind, side=side, name=f"{name}_{kind}_{side}")
            for kind, side in zip(jvpreg.probes.KINDS, ("input", "output", "input", "output"), strict=True)
        ]
        + [regularizers.JacobianNorm(0.1, num_probes=2, name=f"{name}_at_hidden", at="hidden")]
    ),
    "SpectralNorm": lambda name: [
        regularizers.SpectralNorm(0.1, num_iterations=2, name=f"{name}_{at}", at=at) for at in ("data", "hidden")
    ],
    "BiasJacobianNorm": lambda name: [
        regularizers.BiasJacobianNorm(0.1, target=target, name=f"{name}_{target}") for target in ("label", "all")
    ],
    "FullJacobianNorm": lambda name: [regularizers.FullJacobianNorm(0.1, target="predicted", name=name)],
    # These have cases of their own.
    "FixedPointJacobianNorm": lambda name: [],
    "GradientPenalty": lambda name: [],
    "Monotone": lambda name: twice(constraints.Monotone, name, [0]),
    "Bounded": lambda name: twice(constraints.Bounded, name, -0.2, 0.2, DIRECTIONS),
    "Invariant": lambda name: twice(constraints.Invariant, name, DIRECTIONS[:1]),
    "KnownDerivative": lambda name: twice(constraints.KnownDerivative, name, ops.ones_like, DIRECTIONS[:1]),
    "Lipschitz": lambda name: twice(constraints.Lipschitz, name, 0.2),
    "Linear": lambda name: twice(constraints.Linear, name, slopes_beyond, DIRECTIONS),
    "Symmetric": lambda name: twice(constraints.Symmetric, name, 2),
    "DivergenceFree": lambda name: twice(constraints.DivergenceFree, name),
    # The enforcements need no row: each constraint above is made with both.
    "Penalty": lambda name: [],
    "AugmentedLagrangian": lambda name: [],
}

LOSSES = {
    "ActivationMatching": lambda: [distillation.ActivationMatching(0.5)],
    "AttentionMatching": lambda: [distillation.AttentionMatching(0.5, layers=[("maps", "maps")])],
    "BiasJacobianMatching": lambda: [distillation.BiasJacobianMatching(0.5, layers=[("maps", "maps")])],
    "JacobianMatching": lambda: [
        distillation.JacobianMatching(0.5),
        distillation.JacobianMatching(0.5, num_probes=2, name="by_probes"),
    ],
}


def twice(constraint, name, *arguments):
    """A constraint enforced twice: by a penalty at points between the data, and by multipliers in a box."""
    return [
        constraint(*arguments, at="between", name=f"{name}_penalty", **FIXED),
        constraint(*arguments, at=BOX, name=f"{name}_multipliers", **GROWING),
    ]


def rows():
    return [regularizer for name, make in ROWS.items() for regularizer in make(name.lower())]


def base_model():
    return keras.Sequential([keras.Input((3,)), layers.Dense(5, "tanh", name="hidden"), layers.Dense(3)])


def trained(model, x, y=None, loss="mse", callbacks=(), compiled=None, **arguments):
    """All results that must be the same on one device and on several: logs, weights and carried state."""
    model.compile(keras.optimizers.SGD(0.01), loss, **(compiled or {}))
    options = {"batch_size": BATCH, "epochs": 2, "shuffle": False, "verbose": 0, **arguments}
    history = model.fit(x, y, callbacks=list(callbacks), **options).history
    found = {f"logs of {key}": values for key, values in history.items()}
    found |= {f"weight {i}": value for i, value in enumerate(model.get_weights())}
    for tracker in getattr(model, "penalty_metrics", []):
        if getattr(tracker, "carried", None) is not None:
            found[f"carried by {tracker.name}"] = on_each(tracker.carried)
    return found


def on_each(variable):
    """The value of a variable, which must be the same on all replicas."""
    copies = getattr(variable.value, "values", None)
    copies = [ops.convert_to_numpy(variable)] if copies is None else [copy.numpy() for copy in copies]
    for copy in copies[1:]:
        np.testing.assert_array_equal(copy, copies[0])
    return copies[0]


def every_regularizer():
    model = jvpreg.JacobianModel(base_model(), seed=1)
    compiled = {"jacobian_regularizers": rows()}
    return trained(model, X, ONE_HOT, compiled=compiled, validation_data=(X, ONE_HOT))


def an_interval():
    rules = [regularizers.JacobianNorm(0.2), regularizers.SpectralNorm(0.2)]
    compiled = {"jacobian_regularizers": rules, "jacobian_interval": 2}
    return trained(jvpreg.JacobianModel(base_model(), seed=1), X, ONE_HOT, compiled=compiled)


def an_interval_within_one_call():
    rule = constraints.Monotone([0], **GROWING)
    compiled = {"jacobian_regularizers": [rule], "jacobian_interval": 2, "steps_per_execution": 2}
    return trained(jvpreg.JacobianModel(base_model(), seed=1), X, ONE_HOT, compiled=compiled)


def a_fraction_with_weights():
    """Five of eight examples are drawn, so replicas have different numbers of them."""
    rules = [
        regularizers.JacobianNorm(0.2, num_probes=2),
        regularizers.SpectralNorm(0.2),
        constraints.Bounded(-0.1, 0.1, DIRECTIONS, **GROWING),
    ]
    compiled = {"jacobian_regularizers": rules, "jacobian_fraction": 0.6}
    weights = np.linspace(0.0, 2.0, len(X)).astype("float32")
    return trained(jvpreg.JacobianModel(base_model(), seed=1), X, ONE_HOT, compiled=compiled, sample_weight=weights)


def labels_of_a_constraint():
    rules = [constraints.KnownDerivative("dy", DIRECTIONS[:1], **GROWING)]
    labels = {"y": ONE_HOT, "dy": ONE_HOT[:, None]}
    return trained(jvpreg.JacobianModel(base_model(), seed=1), X, labels, compiled={"jacobian_regularizers": rules})


def the_end_of_the_data():
    """In the last batch replicas have different numbers of examples, or none. Keras' own losses differ then."""
    rules = [
        regularizers.JacobianNorm(0.2, num_probes=2, side="input"),
        regularizers.SpectralNorm(0.2),
        constraints.Monotone([0], at="between", **GROWING),
        constraints.Bounded(-0.1, 0.1, DIRECTIONS, name="on_data", **GROWING),
    ]
    model = jvpreg.JacobianModel(base_model(), seed=1)
    found = trained(model, X[: BATCH + BATCH // 2 + 1], loss=None, compiled={"jacobian_regularizers": rules})
    history = model.fit(X[: BATCH + 1], batch_size=BATCH, shuffle=False, verbose=0).history
    again = {f"again, {key}": values for key, values in history.items()}
    return found | again | {f"again, weight {i}": value for i, value in enumerate(model.get_weights())}


def a_layer():
    block = base_model()
    rules = [regularizers.JacobianNorm(0.2, num_probes=2), regularizers.SpectralNorm(0.2)]
    rules.append(constraints.Monotone([0], **GROWING))
    layer = jvpreg.layers.JacobianPenalty(block, rules, seed=1)
    found = trained(keras.Sequential([keras.Input((3,)), layer]), X, ONE_HOT)
    return found | {
        f"carried {i}": on_each(variable) for i, variable in enumerate(layer._carried) if variable is not None
    }


def a_fixed_point():
    x, z = keras.Input((3,)), keras.Input((3,))
    cell = keras.Model([x, z], ops.tanh(layers.Dense(3)(x) + 0.3 * layers.Dense(3)(z)))
    layer = jvpreg.layers.FixedPoint(cell, tolerance=1e-6, unconverged="ignore", max_iterations=100)
    model = jvpreg.JacobianModel(keras.Sequential([keras.Input((3,)), layer]), seed=1)
    rules = [regularizers.FixedPointJacobianNorm(0.2, num_probes=2)]
    return trained(model, X, ONE_HOT, compiled={"jacobian_regularizers": rules})


def a_critic():
    """A replica may have real examples only, and one whose batch ends the data has fewer."""
    base = keras.Sequential([keras.Input((3,)), layers.Dense(5, "tanh"), layers.Dense(1)])
    rules = [regularizers.GradientPenalty(0.2), regularizers.GradientPenalty(0.2, at="data", name="on_data")]
    real = np.arange(len(X))[:, None] % BATCH < BATCH // 2
    count = len(X) - (BATCH // 2 - 1 if keras.backend.backend() == "tensorflow" else 0)
    compiled = {"jacobian_regularizers": rules}
    return trained(jvpreg.JacobianModel(base, seed=1), X[:count], real[:count] - 0.5, loss=None, compiled=compiled)


def linear_solves_that_fail():
    """Each failed solve is counted, whichever replica it is on."""
    x, z = keras.Input((3,)), keras.Input((3,))
    cell = keras.Model([x, z], layers.Dense(3)(x) + 0.9 * layers.Dense(3, kernel_initializer="orthogonal")(z))
    layer = jvpreg.layers.FixedPoint(cell, unconverged="ignore", max_iterations=2, name="equilibrium")
    monitor = jvpreg.callbacks.FixedPointMonitor()
    found = trained(keras.Sequential([keras.Input((3,)), layer]), X, ONE_HOT, callbacks=[monitor], epochs=1)
    names = ("iterations", "unconverged", "linear_unconverged")
    return {name: found[f"logs of equilibrium/{name}"] for name in names}


def a_distiller():
    def network(width):
        parts = [keras.Input((3,)), layers.Reshape((3, 1)), layers.Conv1D(width, 2, activation="tanh", name="maps")]
        return keras.Sequential([*parts, layers.Flatten(), layers.Dense(3)])

    losses = [loss for make in LOSSES.values() for loss in make()]
    distiller = jvpreg.JacobianDistiller(network(4), network(2), losses, seed=1)
    compiled = {"jacobian_regularizers": [regularizers.SpectralNorm(0.1)]}
    return trained(distiller, X, ONE_HOT, compiled=compiled, validation_data=(X, ONE_HOT))


def a_probe():
    metrics = {
        "norm": lambda lin: jvpreg.estimators.frobenius_norm(lin, num_probes=2),
        "sigma": "spectral_norm",
        "trace": "trace",
    }
    labels = ONE_HOT.argmax(axis=1)[:7]
    probe = jvpreg.callbacks.JacobianProbe(X[:7], metrics, labels=labels, every_batches=1)
    guard = jvpreg.callbacks.JacobianGuard(probe, monitor="norm")
    found = trained(base_model(), X, ONE_HOT, callbacks=[probe, guard])
    assert probe.values["norm"].value.shape == (7,), probe.values["norm"].value.shape
    return found | {f"values of {name}": result.value for name, result in probe.values.items()}


def a_penalty_that_is_not_finite():
    """The penalty is not finite on one replica only."""

    class Exploding(regularizers.JacobianRegularizer):
        def directions(self, inputs, labels, seed):
            return ops.expand_dims(ops.ones_like(inputs), 0)

        def penalty(self, seen):
            return ops.exp(seen.inputs[:, 0]) + 0 * seen.jvp[0, :, 0]

    x = X.copy()
    x[-1, 0] = 1000.0
    try:
        trained(jvpreg.JacobianModel(base_model()), x, ONE_HOT, compiled={"jacobian_regularizers": [Exploding(0.1)]})
    except FloatingPointError as error:
        return {"step": [int("at training step 2 " in str(error))], "told": [1]}
    return {"step": [0], "told": [0]}


def several_steps_at_once():
    """On several replicas Keras cannot take several steps at once with any model; `JacobianModel` says so."""
    import tensorflow as tf

    def fails(model, compiled):
        try:
            trained(model, X, ONE_HOT, compiled={"steps_per_execution": 2, **compiled})
        except ValueError as error:
            return "`steps_per_execution`. Expected 1" in str(error)
        except tf.errors.InvalidArgumentError:
            return True
        return False

    regularized = {"jacobian_regularizers": [regularizers.JacobianNorm(0.2)], "jacobian_interval": 2}
    several = tf.distribute.has_strategy()
    plain = fails(base_model(), {})
    ours = fails(jvpreg.JacobianModel(base_model()), regularized)
    return {"as expected": [plain == several, ours == several], "always": [1]}


CASES = {
    "every_regularizer": every_regularizer,
    "an_interval": an_interval,
    "an_interval_within_one_call": an_interval_within_one_call,
    "a_fraction_with_weights": a_fraction_with_weights,
    "labels_of_a_constraint": labels_of_a_constraint,
    "a_layer": a_layer,
    "a_critic": a_critic,
    "a_fixed_point": a_fixed_point,
    "linear_solves_that_fail": linear_solves_that_fail,
    "a_distiller": a_distiller,
    "a_probe": a_probe,
    "a_penalty_that_is_not_finite": a_penalty_that_is_not_finite,
}
if keras.backend.backend() == "tensorflow":  # Not on JAX: it cannot divide a batch that devices do not share evenly.
    CASES["the_end_of_the_data"] = the_end_of_the_data
    del CASES["an_interval_within_one_call"]
    CASES["several_steps_at_once"] = several_steps_at_once


def on_one_device(case):
    keras.utils.set_random_seed(1)
    return case()


@functools.cache
def strategy():
    """One strategy for all cases: TensorFlow would mistake the reductions of a second one for those of the first."""
    import tensorflow as tf

    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(REPLICAS)])


def on_several(case):
    keras.utils.set_random_seed(1)
    if keras.backend.backend() == "tensorflow":
        with strategy().scope():
            return case()
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    try:
        return case()
    finally:
        keras.distribution.set_distribution(None)


def differences(one: dict, other: dict) -> list[str]:
    """The values that differ by more than 1e-5; if they are larger than 1, by more than 1e-5 relatively."""
    told = [f"not in both: {key}" for key in one.keys() ^ other.keys()] + ["nothing"] * (not one)
    for key in one.keys() & other.keys():
        a, b = np.asarray(one[key], "float64"), np.asarray(other[key], "float64")
        if not np.allclose(a, b, rtol=1e-5, atol=1e-5, equal_nan=True):
            told.append(f"{key}: {a.ravel()[:6].tolist()} and {b.ravel()[:6].tolist()}")
        if not np.isfinite(a).all():
            told.append(f"{key} is not finite: {a.ravel()[:6].tolist()}")
    return sorted(told)


def main(path, *names):
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * REPLICAS)
    else:
        import jax

        assert len(jax.devices()) == REPLICAS
    found = {}
    for name in names or CASES:
        try:
            found[name] = differences(on_one_device(CASES[name]), on_several(CASES[name]))
        except Exception:  # The error of one case must not hide the results of the others.
            found[name] = traceback.format_exc().splitlines()[-12:]
        with open(path, "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
