"""The error of the implicit gradient, by the tolerance of the solves, in float64."""

import keras
import numpy as np
from keras import ops

import jvpreg
from experiments import data
from experiments.fixed_point import network
from jvpreg.engine.transpose import transpose

TIGHT = 1e-12
MOST_ITERATIONS = 500


def errors(trained: keras.Model, split: data.Split, tolerances: list[float]) -> list[dict]:
    """Relative errors of the gradient of the loss by all weights, for solvers of both kinds.

    Args:
        trained: the model at whose weights it is measured.
        split: the images.
        tolerances: of both solves.

    Returns:
        A row for each adjoint solver and tolerance: `adjoint_solver`, `tolerance`, `error`, and the mean `iterations`
        of the solve for the fixed point. The reference is the gradient at a tolerance of 1e-12.
    """
    with jvpreg.testing.float64():
        reference, _ = gradient(trained, split, "gmres", TIGHT)
        rows = []
        for solver in ("gmres", "picard"):
            for tolerance in tolerances:
                found, iterations = gradient(trained, split, solver, tolerance)
                error = float(np.linalg.norm(found - reference) / np.linalg.norm(reference))
                rows.append(
                    {"adjoint_solver": solver, "tolerance": tolerance, "error": error, "iterations": iterations}
                )
    return rows


def gradient(trained: keras.Model, split: data.Split, solver: str, tolerance: float) -> tuple[np.ndarray, float]:
    """The gradient as one vector, and the mean of the iterations."""
    width = trained.get_layer("inject").filters
    arguments = {"adjoint_solver": solver, "tolerance": tolerance, "max_iterations": MOST_ITERATIONS}
    classes = trained.output_shape[-1]
    model = network.build(trained.input_shape[1:], classes, width, unconverged="ignore", **arguments)
    model.set_weights(trained.get_weights())
    weights = model.trainable_variables
    images, labels = ops.convert_to_tensor(split.images().astype("float64")), ops.convert_to_tensor(split.labels)

    def loss(values):
        with keras.StatelessScope(state_mapping=list(zip(weights, values, strict=True))):
            logits = model(images)
        losses = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
        return [ops.mean(losses)]

    values = [ops.stop_gradient(weight.value) + 0 for weight in weights]
    found = transpose(loss, values, [ops.ones((), "float64")])
    counts = model.get_layer(network.LAYER).take_counts()
    flat = [ops.convert_to_numpy(ops.stop_gradient(part)).ravel() for part in found]
    return np.concatenate(flat), counts["iterations"] / counts["examples"]
