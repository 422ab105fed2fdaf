"""A right call of every public function and class, one row for each name, for the fuzz of the interface."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import keras
import numpy as np
from keras import layers

import jvpreg
from jvpreg import callbacks, clone, constraints, distillation, estimators, probes, regularizers, testing
from jvpreg import layers as our_layers
from jvpreg.attribution import saliency
from jvpreg.constraints import tangents

random = np.random.default_rng(0)
X = random.normal(size=(4, 3)).astype("float32")
U = random.normal(size=(4, 3)).astype("float32")
V = random.normal(size=(4, 2)).astype("float32")
IMAGES = random.uniform(size=(2, 4, 4, 1)).astype("float32")
LABELS = np.array([0, 1, 0, 1])
TOKENS = random.integers(9, size=(4, 5))


@dataclass(frozen=True)
class Row:
    """A right call.

    Attributes:
        function: the function or class that is called.
        arguments: by name. One that must be made anew for each call is a function without arguments.
        fixed: names of arguments that are not changed.
    """

    function: Callable
    arguments: dict = field(default_factory=dict)
    fixed: tuple[str, ...] = ()


@functools.cache
def network():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((3,)), layers.Dense(3, activation="tanh", name="hidden"), layers.Dense(2, name="last")]
    )


@functools.cache
def field_network():
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((3,)), layers.Dense(3, activation="tanh", name="hidden")])


@functools.cache
def of_images():
    keras.utils.set_random_seed(2)
    return keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            layers.Conv2D(2, 3, padding="same", activation="relu", name="convolution"),
            layers.Flatten(),
            layers.Dense(3, name="last"),
        ]
    )


@functools.cache
def of_words():
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            layers.Embedding(9, 3, name="embedding"),
            layers.Flatten(),
            layers.Dense(3, activation="tanh"),
            layers.Dense(2),
        ]
    )


@functools.cache
def cell():
    x, z = keras.Input((3,)), keras.Input((3,))
    return keras.Model([x, z], keras.ops.tanh(layers.Dense(3)(x) + 0.1 * z))


@functools.cache
def equilibrium():
    return keras.Sequential([keras.Input((3,)), our_layers.FixedPoint(cell(), name="equilibrium")])


@functools.cache
def lin():
    return jvpreg.linearize(network(), X)


@functools.cache
def twice():
    return jvpreg.linearize(network(), X, order=2)


@functools.cache
def square():
    return jvpreg.linearize(field_network(), X)


@functools.cache
def operator():
    matrix = np.diag([1.0, 2.0, 3.0]).astype("float32")
    product = functools.partial(keras.ops.matmul, x2=matrix)
    return estimators.Operator(lambda v: product(v), lambda v: product(v), shape=(3, 3), batch_size=2)


@functools.cache
def probe():
    return callbacks.JacobianProbe(X, ["frobenius_norm"])


@functools.cache
def weight_tangents():
    return {network().trainable_variables[0].path: np.ones((3, 3), "float32")}


def compiled(**arguments):
    model = jvpreg.JacobianModel(network())
    model.compile(loss="mse", **arguments)
    return model


def register(operations, activation):
    operations = operations if isinstance(operations, tuple) else (operations,)
    known = dict(jvpreg.rules.registry._RULES)
    try:
        jvpreg.register_rule(*operations, activation=activation)(lambda layer, x, context: None)
    finally:
        jvpreg.rules.registry._RULES.clear()
        jvpreg.rules.registry._RULES.update(known)


class Own(layers.Layer):
    """A layer without a rule."""


def rows() -> dict[str, Row]:
    """A row for each public name."""
    model = network()
    options = {"training": False, "batch_statistics": None, "fallback": "warn", "xla": None}
    of_lin = {"linearization": lin()}
    iteration = {"tolerance": 1e-2, "num_iterations": 2, "max_restarts": 1, "seed": 0}
    quadrature = {"num_probes": 2, "num_iterations": 2, "seed": 0}
    enforced = {"enforcement": 1.0, "at": "data", "tolerance": 1e-3, "name": "own"}
    map_of = {"model": of_images(), "x": IMAGES, "target": 1}
    of_tokens = {"model": of_words(), "x": TOKENS, "target": LABELS, "at": "embedding", "batch_size": 3}
    stacked = np.concatenate([IMAGES, IMAGES, 0 * IMAGES])
    found = {
        "layer_paths": Row(jvpreg.layer_paths, {"model": model}),
        "linearize": Row(jvpreg.linearize, {"model": model, "x": X, **options, "at": "hidden", "order": 2}),
        "jvp": Row(jvpreg.jvp, {"model": model, "x": X, "u": U, **options, "at": "hidden"}),
        "vjp": Row(jvpreg.vjp, {"model": model, "x": X, "v": V, **options, "at": "hidden"}),
        "weight_jvp": Row(jvpreg.weight_jvp, {"model": model, "x": X, "weights": weight_tangents()}),
        "jacobian": Row(jvpreg.jacobian, {"model": model, "x": X, "chunk_size": 2, "at": "hidden"}),
        "hessian": Row(jvpreg.hessian, {"model": model, "x": X, "chunk_size": 2, "at": None}, ("at",)),
        "full_jacobian": Row(
            jvpreg.full_jacobian, {"model": model, "x": X, "target": LABELS, **options, "at": "hidden"}
        ),
        "TangentModel": Row(jvpreg.TangentModel, {"base": model, "name": "tangent"}, ("name",)),
        "JacobianModel": Row(jvpreg.JacobianModel, {"base": model, "seed": 0, "name": "own"}, ("name",)),
        "JacobianDistiller": Row(
            jvpreg.JacobianDistiller,
            {
                "teacher": lambda: keras.models.clone_model(network()),
                "student": lambda: keras.models.clone_model(network()),
                "losses": [distillation.ActivationMatching(1.0)],
                "seed": 0,
            },
        ),
        "register_rule": Row(register, {"operations": Own, "activation": None}),
        "JacobianModel.compile": Row(
            compiled,
            {
                "jacobian_regularizers": [regularizers.JacobianNorm(0.1)],
                "jacobian_interval": 2,
                "jacobian_fraction": 0.5,
                "jacobian_evaluate": True,
            },
        ),
        "Linearization.jvp": Row(lin().jvp, {"u": U, "weights": weight_tangents(), "taps": {"hidden": U}}),
        "Linearization.vjp": Row(lin().vjp, {"v": V}),
        "Linearization.pack_inputs": Row(lin().pack_inputs, {"leaves": [X]}),
        "Linearization.flatten_inputs": Row(lin().flatten_inputs, {"structure": X}),
        "Linearization.intercepts_of": Row(lin().intercepts_of, {"nodes": ["hidden"]}),
        "Linearization.node_outputs": Row(lin().node_outputs, {"layers": ["hidden"]}),
        "Linearization.gradients": Row(lin().gradients, {"v": V, "nodes": ["hidden"], "with_inputs": True}),
        "Linearization.bias_jacobians": Row(lin().bias_jacobians, {"v": V, "nodes": ["hidden"], "with_inputs": True}),
        "Linearization.modified_vjp": Row(lin().modified_vjp, {"v": V, "change": lambda node, vs: vs}, ("change",)),
        "Linearization.nodes_of": Row(lin().nodes_of, {"layer": "hidden"}),
        "Linearization.nodes_after_input": Row(lin().nodes_after_input, {"place": 0}),
        "Linearization.take": Row(lambda indices: lin().take(indices).outputs, {"indices": [0, 2]}),
        "Linearization.after": Row(lambda layer: lin().after(layer).jvp(U), {"layer": "hidden"}),
        "Linearization.block": Row(lambda layer: lin().block(layer).jvp(U), {"layer": "hidden"}),
        "Linearization.shape_at": Row(lin().shape_at, {"name": "hidden", "batch": 2}, ("batch",)),
        "Linearization.from_examples": Row(lin().from_examples, {"name": "last", "tensor": V[None]}),
        "Linearization.by_example": Row(lin().by_example, {"name": "last", "tensor": V, "probed": False}),
        "Linearization.gains": Row(lin().gains, {"u": U}),
        "Linearization.tangents_by_slot": Row(lin().tangents_by_slot, {"u": U}),
        "Linearization.jacobian": Row(lin().jacobian, {"chunk_size": 2}),
        "Linearization.hvp": Row(twice().hvp, {"u": U, "w": U}),
        "Linearization.laplacian": Row(twice().laplacian, {"directions": U[None], "chunk_size": 2}),
        "Linearization.hessian": Row(twice().hessian, {"chunk_size": 2}),
        "Linearization.affine_map": Row(lin().affine_map, {"chunk_size": 2}),
        "Linearization.linear_operator": Row(lin().linear_operator, {"example": 1}),
        "estimators.Operator": Row(
            estimators.Operator,
            {
                "matvec": abs,
                "rmatvec": abs,
                "shape": (2, 2),
                "batch_size": 2,
                "dtype": "float32",
                "chunk_size": 4,
            },
        ),
        "estimators.condition_number": Row(estimators.condition_number, {**of_lin, "max_matvecs": 16}),
        "estimators.diagonal": Row(estimators.diagonal, {"linearization": square(), "num_matvecs": 2, "seed": 0}),
        "estimators.effective_rank": Row(estimators.effective_rank, {**of_lin, **quadrature, "tolerance": 0.1}),
        "estimators.fixed_point_spectral_radius": Row(
            estimators.fixed_point_spectral_radius,
            {"linearization": jvpreg.linearize(equilibrium(), X), "layer": "equilibrium", "tolerance": 0.1, "seed": 0},
        ),
        "estimators.frobenius_norm": Row(
            estimators.frobenius_norm,
            {**of_lin, "num_probes": 2, "side": "input", "probes": "sphere", "method": "hutchinson", "seed": 0},
        ),
        "estimators.inverse_frobenius_norm": Row(
            estimators.inverse_frobenius_norm, {"linearization": square(), **quadrature, "tolerance": 0.1}
        ),
        "estimators.log_determinant": Row(
            estimators.log_determinant, {**of_lin, "of": "JJT", "shift": 1.0, **quadrature}
        ),
        "estimators.row_norms": Row(estimators.row_norms, {**of_lin, "num_probes": 2, "probes": "gaussian", "seed": 0}),
        "estimators.schatten_norm": Row(
            estimators.schatten_norm, {**of_lin, "order": 1.0, **quadrature, "tolerance": 0.1}
        ),
        "estimators.singular_values": Row(estimators.singular_values, of_lin),
        "estimators.spectral_density": Row(
            estimators.spectral_density, {**of_lin, "num_points": 4, "width": 0.1, **quadrature}
        ),
        "estimators.spectral_norm": Row(estimators.spectral_norm, {**of_lin, **iteration}),
        "estimators.stable_rank": Row(estimators.stable_rank, {**of_lin, "num_probes": 2, **iteration}),
        "estimators.top_eigenvalues": Row(estimators.top_eigenvalues, {"linearization": square(), "k": 1, **iteration}),
        "estimators.top_singular_values": Row(estimators.top_singular_values, {**of_lin, "k": 2, **iteration}),
        "estimators.trace": Row(
            estimators.trace, {"linearization": square(), "num_matvecs": 4, "method": "xtrace", "seed": 0}
        ),
        "regularizers.JacobianNorm": Row(
            regularizers.JacobianNorm,
            {"strength": 0.1, "num_probes": 2, "probes": "sphere", "side": "input", "name": "own", "at": "hidden"},
        ),
        "regularizers.SpectralNorm": Row(
            regularizers.SpectralNorm, {"strength": 0.1, "num_iterations": 1, "name": "own", "at": "hidden"}
        ),
        "regularizers.BiasJacobianNorm": Row(
            regularizers.BiasJacobianNorm,
            {"strength": 0.1, "layers": ["last"], "target": "label", "num_probes": 1, "at": "hidden"},
        ),
        "regularizers.FullJacobianNorm": Row(
            regularizers.FullJacobianNorm,
            {
                "strength": 0.1,
                "input_weight": 1.0,
                "bias_weight": 1.0,
                "layers": ["last"],
                "target": "label",
                "at": "hidden",
            },
        ),
        "regularizers.FixedPointJacobianNorm": Row(
            regularizers.FixedPointJacobianNorm, {"strength": 0.1, "layer": "equilibrium", "num_probes": 1}
        ),
        "regularizers.GradientPenalty": Row(
            regularizers.GradientPenalty, {"strength": 0.1, "target": 1.0, "at": "data", "one_sided": True}
        ),
        "regularizers.JacobianRegularizer": Row(
            regularizers.JacobianRegularizer, {"strength": 0.1, "name": "own", "at": "hidden"}
        ),
        "constraints.Constraint": Row(constraints.Constraint, enforced),
        "constraints.AugmentedLagrangian": Row(constraints.AugmentedLagrangian, {"rho": 1.0, "update_every": 2}),
        "constraints.Penalty": Row(constraints.Penalty, {"strength": 1.0, "schedule": None}),
        "constraints.Bounded": Row(constraints.Bounded, {"low": 0.0, "high": 1.0, "directions": [0], **enforced}),
        "constraints.Monotone": Row(constraints.Monotone, {"features": [0, 2], "increasing": True, **enforced}),
        "constraints.Invariant": Row(constraints.Invariant, {"tangents": np.ones((1, 3)), **enforced}),
        "constraints.KnownDerivative": Row(
            constraints.KnownDerivative, {"targets": "slope", "directions": [0], **enforced}
        ),
        "constraints.Linear": Row(constraints.Linear, {"function": abs, "directions": [0], "equality": True}),
        "constraints.Lipschitz": Row(constraints.Lipschitz, {"bound": 1.0, "norm": 2, "side": "output", **enforced}),
        "constraints.DivergenceFree": Row(constraints.DivergenceFree, enforced),
        "constraints.Symmetric": Row(constraints.Symmetric, {"num_pairs": 2, **enforced}),
        "constraints.Box": Row(constraints.Box, {"low": 0.0, "high": [1.0, 2.0, 1.0], "num_points": 4}),
        "constraints.Segment": Row(constraints.Segment, {"start": np.zeros(3), "end": np.ones(3)}),
        "constraints.Rectangle": Row(
            constraints.Rectangle, {"corner": np.zeros(2), "first": np.ones(2), "second": np.array([1.0, 0.0])}
        ),
        "constraints.between": Row(constraints.between, {"inputs": X, "seed": 0}),
        "constraints.verify": Row(
            constraints.verify,
            {"model": model, "constraint": constraints.Monotone([0]), "x": X, "labels": None, "seed": 0},
            ("labels",),
        ),
        "callbacks.FixedPointMonitor": Row(callbacks.FixedPointMonitor),
        "callbacks.JacobianProbe": Row(
            callbacks.JacobianProbe,
            {
                "x": X,
                "metrics": ["frobenius_norm"],
                "at": "hidden",
                "labels": LABELS,
                "layers": ["hidden"],
                "blocks": ["hidden"],
                "every_epochs": 1,
                "every_batches": 2,
                "seed": 0,
                "prefix": "own",
                "folder": "own",
            },
        ),
        "callbacks.JacobianGuard": Row(
            callbacks.JacobianGuard,
            {
                "probe": probe(),
                "monitor": "frobenius_norm",
                "explosion": 9.0,
                "collapse": 0.1,
                "window": 2,
                "action": "stop",
            },
        ),
        "callbacks.JacobianPictures": Row(
            callbacks.JacobianPictures, {"probe": probe(), "folder": "own", "log_dir": None, "every_epochs": 1}
        ),
        "callbacks.JacobianProgbarLogger": Row(callbacks.JacobianProgbarLogger, {"probe": probe()}),
        "callbacks.JacobianWandbLogger": Row(
            callbacks.JacobianWandbLogger,
            {"probe": probe(), "every_epochs": 1, "every_batches": 2, "history": "own.csv"},
            ("every_epochs",),
        ),
        "distillation.ActivationMatching": Row(
            distillation.ActivationMatching, {"weight": 1.0, "temperature": 2.0, "name": "own"}
        ),
        "distillation.AttentionMatching": Row(
            distillation.AttentionMatching, {"weight": 1.0, "layers": [("a", "b")], "normalized": True}
        ),
        "distillation.BiasJacobianMatching": Row(
            distillation.BiasJacobianMatching, {"weight": 1.0, "layers": "auto", "target": "label"}
        ),
        "distillation.JacobianMatching": Row(
            distillation.JacobianMatching, {"weight": 1.0, "target": "label", "num_probes": None}
        ),
        "distillation.MatchingLoss": Row(distillation.MatchingLoss, {"weight": 1.0, "name": "own"}),
        "layers.FixedPoint": Row(
            our_layers.FixedPoint,
            {
                "cell": cell(),
                "solver": "picard",
                "tolerance": 1e-3,
                "max_iterations": 5,
                "adjoint_solver": "gmres",
                "unconverged": "ignore",
                "state_shape": (3,),
            },
        ),
        "layers.JacobianPenalty": Row(
            our_layers.JacobianPenalty,
            {"block": model, "regularizers": [regularizers.JacobianNorm(0.1)], "seed": 0},
        ),
        "probes.draw": Row(probes.draw, {"kind": "gaussian", "like": X, "num_probes": 2, "seed": 0}),
        "probes.basis": Row(probes.basis, {"like": X}),
        "clone.stack": Row(clone.stack, {"x": X, "u": U}),
        "clone.unstack": Row(clone.unstack, {"h": stacked, "num_probes": None}),
        "clone.activation": Row(clone.activation, {"h": stacked, "negative_slope": 0.1, "num_probes": 1}),
        "clone.max_pool": Row(clone.max_pool, {"h": stacked, "pool_size": 2, "num_probes": 1}),
        "clone.dropout": Row(clone.dropout, {"h": stacked, "rate": 0.5, "seed": 0, "num_probes": 1}),
        "clone.batch_normalization": Row(clone.batch_normalization, {"h": stacked, "num_probes": 1}),
        "attribution.saliency.full_jacobian": Row(saliency.full_jacobian, {**map_of, "interpolation": "nearest"}),
        "attribution.saliency.bias_jacobian": Row(saliency.bias_jacobian, {**map_of, "interpolation": "nearest"}),
        "attribution.saliency.input_gradient": Row(saliency.input_gradient, {**of_tokens, "reduce": "norm"}),
        "attribution.saliency.gradient_times_input": Row(
            saliency.gradient_times_input, {**map_of, "reduce": None, "batch_size": 1}
        ),
        "attribution.saliency.integrated_gradients": Row(
            saliency.integrated_gradients,
            {**map_of, "baseline": 0.0, "num_steps": 1, "method": "riemann_middle", "return_convergence_delta": True},
        ),
        "attribution.saliency.smooth_grad": Row(
            saliency.smooth_grad, {**map_of, "noise": 0.1, "num_samples": 1, "seed": 0}
        ),
        "attribution.saliency.guided_backpropagation": Row(saliency.guided_backpropagation, map_of),
        "attribution.saliency.grad_cam": Row(
            saliency.grad_cam, {**map_of, "layer": "convolution", "interpolation": "nearest"}
        ),
        "testing.check_rule": Row(
            testing.check_rule,
            {"layer": layers.ReLU(), "input_shape": (3,), "batch_size": 2, "jit": False, "tolerance": 1e-8, "seed": 0},
            ("jit", "tolerance"),
        ),
    }
    for name in ("Translation", "Rotation", "Scaling", "Brightness"):
        made = getattr(tangents, name)
        amount = np.array([1.0, 0.5], "float32")
        found[f"constraints.tangents.{name}"] = Row(made, {"size": 1.0})
        found[f"constraints.tangents.{name}.transform"] = Row(made().transform, {"images": IMAGES, "amount": amount})
    return found


# Names that users do not call: results of functions, bases that a row covers, and functions that only rules call.
NOT_CALLED = {
    *("FullJacobian", "Linearization"),
    *("callbacks.GuardEvent", "constraints.ExactReport", "constraints.Report", "distillation.JacobianDistiller"),
    *(f"regularizers.{name}" for name in ("Carries", "Constrains", "Looks", "Scheduled", "Searches")),
    *("distillation.View", "estimators.Estimate", "estimators.SpectralDensity", "regularizers.Seen"),
    *(f"attribution.saliency.{name}" for name in ("METHODS", "figure", "token_figure")),
    *("testing.float64", "testing.compiled", "probes.dimension", "probes.split"),
    "constraints.tangents.resample",
}


def public_names() -> list[str]:
    """Every function and class of the package that has no underscore, as `module.name`."""
    names = [name for name in jvpreg.__all__ if not inspect.ismodule(getattr(jvpreg, name))]
    modules = [callbacks, clone, constraints, distillation, estimators, our_layers, probes, regularizers, saliency]
    for module in [*modules, tangents, testing]:
        place = module.__name__.removeprefix("jvpreg.")
        known = getattr(module, "__all__", None) or [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__ and callable(value)
        ]
        names += [f"{place}.{name}" for name in known if not inspect.ismodule(getattr(module, name))]
    methods = [pair for kind in jvpreg.Linearization.mro()[:-1] for pair in vars(kind).items()]
    return names + [
        f"Linearization.{name}" for name, value in methods if inspect.isfunction(value) and not name.startswith("_")
    ]
