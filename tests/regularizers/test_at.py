"""Regularizers and constraints that look at a layer: the same, by numbers, on a model that begins after the layer."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg import constraints, regularizers
from jvpreg.common import seeds
from jvpreg.engine.frozen_graph import FrozenGraph
from jvpreg.regularizers import JacobianNorm
from jvpreg.regularizers.serving import serve
from tests.compare import normal, numpy, randomize

TOKENS = np.random.default_rng(0).integers(0, 9, size=(4, 3))


def model_of_tokens():
    keras.utils.set_random_seed(0)
    return randomize(
        keras.Sequential(
            [
                keras.Input((3,), dtype="int32"),
                layers.Embedding(9, 2, name="embedding"),
                layers.Flatten(),
                layers.Dense(4, activation="tanh", name="hidden"),
                layers.Dense(4, activation="tanh", name="last"),
            ]
        )
    )


def after(model, path):
    """The model that begins after a layer, and what this layer returns."""
    count = 1 + [layer.name for layer in model.layers].index(path)
    before, behind = model.layers[:count], model.layers[count:]
    h = TOKENS
    for layer in before:
        h = layer(h)
    return keras.Sequential([keras.Input(h.shape[1:]), *behind]), h


def beyond(inputs, outputs, products):
    return ops.sum(ops.sin(inputs), axis=-1, keepdims=True) + outputs - products[0]


DIRECTIONS = normal(2, 4)
# Of each kind one, made with the arguments that it is given beside.
AT_EMBEDDING = {
    "JacobianNorm": lambda **more: JacobianNorm(0.3, num_probes=2, **more),
    "JacobianNorm, output": lambda **more: JacobianNorm(0.2, side="output", name="back", **more),
    "SpectralNorm": lambda **more: regularizers.SpectralNorm(0.3, **more),
    "BiasJacobianNorm": lambda **more: regularizers.BiasJacobianNorm(2.0, ["hidden"], target="all", **more),
    "FullJacobianNorm": lambda **more: regularizers.FullJacobianNorm(0.5, target="predicted", **more),
}
AT_HIDDEN = {
    "Monotone": lambda **more: constraints.Monotone([0, 3], **more),
    "Bounded": lambda **more: constraints.Bounded(-0.1, 0.1, DIRECTIONS, **more),
    "Invariant": lambda **more: constraints.Invariant(ops.sin, **more),
    "KnownDerivative": lambda **more: constraints.KnownDerivative(ops.cos, [1], **more),
    "Linear": lambda **more: constraints.Linear(beyond, [0], **more),
    "Lipschitz": lambda **more: constraints.Lipschitz(0.1, side="input", **more),
    "Symmetric": lambda **more: constraints.Symmetric(**more),
    "DivergenceFree": lambda **more: constraints.DivergenceFree(**more),
}
ROWS = {"embedding": AT_EMBEDDING, "hidden": AT_HIDDEN}


def listed():
    return [make(at=path) for path, rows in ROWS.items() for make in rows.values()]


def penalties(model, carried, held):
    """What the rows charge on models that begin after the layers: the mean of each, in order.

    `held`: an empty dict for the directions of `SpectralNorm`, which its gradient takes as constant.
    """
    seed, found = seeds.generator(0, 0), []
    for path, rows in ROWS.items():
        behind, h = after(model, path)
        own = [make() for make in rows.values()]
        for searching in [regularizer for regularizer in own if isinstance(regularizer, regularizers.SpectralNorm)]:
            search = searching.search
            searching.search = lambda *arguments, search=search: held.setdefault(0, search(*arguments))
        state = [carried.get(regularizer.name) for regularizer in own]
        outcomes = serve(own, jvpreg.linearize(behind, h), seed, carried=state).outcomes()
        found += [numpy(ops.mean(ops.stop_gradient(outcome.penalty))) for outcome in outcomes]
    return np.array(found)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_all_of_them_see_what_a_model_after_the_layer_shows():
    base, rows = model_of_tokens(), listed()
    model = jvpreg.JacobianModel(base, seed=0)
    model.compile(keras.optimizers.SGD(1.0), loss=None, jacobian_regularizers=rows)
    carried = {t.name: ops.convert_to_tensor(numpy(t.carried)) for t in model._trackers if t.carried is not None}
    before, held = base.get_weights(), {}
    expected = penalties(base, carried, held)
    assert np.all(expected > 1e-4)
    logs = model.train_on_batch(TOKENS, return_dict=True)
    np.testing.assert_allclose([logs[row.name] for row in rows], expected, rtol=1e-5)
    # The weights moved by the gradient, which goes through the layers before as well.
    gradient = [old - new for old, new in zip(before, base.get_weights(), strict=True)]
    along = [normal(*weight.shape, seed=i) for i, weight in enumerate(before)]
    step, charged = 1e-6, []
    for sign in (1, -1):
        base.set_weights([weight + sign * step * u for weight, u in zip(before, along, strict=True)])
        charged.append(penalties(base, carried, held) @ [row.strength for row in rows])
    received = sum(np.sum(g * u) for g, u in zip(gradient, along, strict=True))
    np.testing.assert_allclose(received, (charged[0] - charged[1]) / (2 * step), rtol=1e-5)


def test_one_run_serves_all_and_tangents_go_through_what_comes_after(monkeypatch):
    passes, runs = [], []
    push, call = FrozenGraph.push, layers.Embedding.call
    names = [["flatten", "hidden", "hidden/activation", "last", "last/activation"]]
    names.append(names[0][3:])

    def counted(graph, tangents, *arguments, **options):
        passes.append(([node.name for node in graph.nodes], tangents[0].shape[0]))
        return push(graph, tangents, *arguments, **options)

    monkeypatch.setattr(FrozenGraph, "push", counted)
    monkeypatch.setattr(layers.Embedding, "call", lambda *arguments: runs.append(1) or call(*arguments))
    lin = jvpreg.linearize(model_of_tokens(), TOKENS)
    rows = [JacobianNorm(1.0, at="embedding"), JacobianNorm(1.0, 2, at="hidden"), JacobianNorm(1.0, 3, at="embedding")]
    serve(rows, lin, 0).outcomes()
    assert [(nodes[-len(names[i]) :], count) for i, (nodes, count) in enumerate(passes)] == [
        (names[0], 4),
        (names[1], 2),
    ]
    assert [len(nodes) for nodes, _ in passes] == [len(part) for part in names]
    assert len(runs) == 1


def compiled(*rows, model=None, **arguments):
    model = jvpreg.JacobianModel(model or model_of_tokens(), seed=0)
    model.compile("sgd", "mse", jacobian_regularizers=list(rows), **arguments)
    return model


def twice():
    x = keras.Input((3,))
    shared = layers.Dense(3, name="shared")
    return keras.Model(x, shared(shared(x)) + layers.Dense(3, name="beside")(ops.stop_gradient(x)))


OF = r"Invalid value for argument `at` of `frobenius_norm_squared` \(JacobianNorm\)."
REFUSED = {
    "no layer": (
        lambda: compiled(JacobianNorm(1.0, at="embeding")),
        OF + r".*\"data\", or the path.*Did you mean 'embedding'",
    ),
    "no word": (
        lambda: compiled(constraints.Lipschitz(1.0, at="betwen")),
        r"`at` of `lipschitz` \(Lipschitz\). Expected \"data\", \"between\", a function of points, or the path",
    ),
    "no path": (lambda: JacobianNorm(1.0, at=3), "`at` of JacobianNorm. Expected a string"),
    "twice": (lambda: compiled(JacobianNorm(1.0, at="shared"), model=twice()), OF + ".*runs once.*at='shared'"),
    "tokens": (lambda: compiled(JacobianNorm(1.0)), r"\(JacobianNorm\) would be 0.*`at=\"embedding\"`"),
    "shape": (lambda: compiled(constraints.Monotone([4], at="hidden")), "`features`. Expected features .* from 0 to 3"),
    "name": (lambda: compiled(*[JacobianNorm(1.0, at=at) for at in ROWS]), "names that differ.*that differ by `at`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_told_at_compile(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_where_sizes_are_not_known_the_first_step_tells():
    x = keras.Input((None,), dtype="int32")
    mean = layers.GlobalAveragePooling1D(name="mean")(layers.Embedding(9, 2)(x))
    model = compiled(
        constraints.Monotone([2], at="mean"), model=keras.Model(x, layers.Dense(1)(mean)), run_eagerly=True
    )
    with pytest.raises(ValueError, match=r"`features`. Expected features .* from 0 to 1"):
        model.train_on_batch(TOKENS, np.ones((4, 1)))


@pytest.mark.slow
def test_a_model_that_looks_at_a_layer_is_saved_with_it(tmp_path):
    """In mixed precision, on a part of the batch, compiled by XLA where there is XLA."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        rows = [JacobianNorm(0.1, at="embedding"), JacobianNorm(0.1, at="hidden", name="second")]
        model = compiled(*rows, jacobian_fraction=0.5, jit_compile=keras.backend.backend() != "torch")
        model.fit(TOKENS, normal(4, 4), verbose=0)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        assert [row.at for row in loaded.jacobian_regularizers] == ["embedding", "hidden"]
        logs = [m.evaluate(TOKENS, normal(4, 4), verbose=0, return_dict=True) for m in (model, loaded)]
        assert logs[0]["frobenius_norm_squared"] > 1e-3
        assert logs[0] == pytest.approx(logs[1], rel=1e-6)
    finally:
        keras.config.set_dtype_policy("float32")


def test_within_a_block_and_verified_at_points():
    behind, h = after(model_of_tokens(), "embedding")
    seen = jvpreg.layers.JacobianPenalty(behind, [JacobianNorm(1.0, 4, "orthogonal", at="hidden")])
    seen(h, training=True)
    lin = jvpreg.linearize(behind, h, at="hidden")
    norm = np.mean(numpy(jvpreg.estimators.frobenius_norm(lin).value) ** 2)
    np.testing.assert_allclose(float(numpy(ops.stop_gradient(seen.losses[0]))), norm, rtol=1e-4)
    report = constraints.verify(model_of_tokens(), constraints.Lipschitz(0.1, at="hidden"), TOKENS)
    np.testing.assert_allclose(report.violations, numpy(jvpreg.estimators.spectral_norm(lin).value) - 0.1, rtol=1e-3)
