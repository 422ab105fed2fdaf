"""A layer that returns the fixed point of a cell, differentiated implicitly."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from jvpreg.common import checks, keras_private
from jvpreg.common.typing import Config, Shapes, Structure, Tensor
from jvpreg.engine.inputs import call_signature
from jvpreg.engine.paths import is_graph
from jvpreg.engine.tracer import freeze
from jvpreg.fixed_points import derivatives
from jvpreg.fixed_points.derivatives import ImplicitPushforward
from jvpreg.fixed_points.solvers import NONLINEAR, SOLVERS, Solution, find_fixed_point, relative_residual
from jvpreg.rules.contract import Context, Pushforward
from jvpreg.rules.registry import register_rule

Solver = Literal["anderson", "broyden", "picard"]
LinearSolver = Literal["gmres", "anderson", "broyden", "picard"]

# Each is a sum over examples; only the last is a sum over linear solves.
COUNTS = ("examples", "iterations", "residual", "unconverged", "linear_unconverged")


@keras.saving.register_keras_serializable(package="jvpreg")
class FixedPoint(keras.layers.Layer):
    """Returns the fixed point `z = f(x, z)` of a cell, found from z = 0 for each example by itself.

    Derivatives are implicit, of any order: forward `w = ∂ₓf v + ∂_z f w`; backward `u = v + ∂_z fᵀ u` and then `∂ₓfᵀ
    u`. Both are solved with the cell frozen at the fixed point. The iterates are not kept, so the memory of a training
    step does not grow with their number. During a solve dropout keeps one mask. Batch statistics are updated once; with
    them an example's residual depends on the other examples.

    If an iterate reaches the tolerance, the one that follows from it is returned: it costs nothing more, and is nearly
    always more exact, with plain iteration by the factor by which the cell contracts. If none does, the best one is
    returned, and the solve is counted: a `FixedPointMonitor` puts the numbers into the logs. If an example's iterates
    are no longer finite, its last best one is kept, and the rest of the batch is not affected.

    Args:
        cell: a model or layer of x and z that returns a tensor like z. It is called with the list `[x, z]`, or, if its
            `call` has two arguments, with these.
        solver: `"anderson"`, `"broyden"` or `"picard"`.
        tolerance: an example has converged when `‖f(x, z) − z‖ ≤ tolerance · ‖f(x, z)‖` for one of its iterates, and a
            linear solve when its residual is within this part of its right-hand side.
        max_iterations: of each solve, in evaluations of the cell or products with its Jacobian.
        adjoint_solver: for the linear solves of both modes: `"gmres"`, or one of the others.
        unconverged: what to do about a solve that has not converged. `"warn"`: if the layer runs eagerly, it warns at
            once; in a compiled step only a `FixedPointMonitor` can warn, and without one the layer says so. `"error"`:
            if the layer runs eagerly, it raises; in a compiled step the outputs of these examples, or their
            derivatives, become NaN. `"ignore"`: it is only counted.
        state_shape: of z, without the batch; by default that of the second input of a functional model, or of x.
        **kwargs: of `keras.Layer`: `name`.

    Raises:
        ValueError: an argument is out of its range; or, when the layer is built, the cell does not return a tensor
            like z.
        FloatingPointError: a solve has not converged, and `unconverged="error"`.

    Reference: Bai, Kolter & Koltun (2019), "Deep Equilibrium Models", section 3; Gavves, "Jacobian-vector and
    vector-Jacobian products", on fixed points, for both modes.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> x, z = keras.Input((3,)), keras.Input((1,))
    >>> cell = keras.Model([x, z], keras.layers.Dense(1, kernel_initializer="ones")(x) + 0.5 * z)
    >>> layer = jvpreg.layers.FixedPoint(cell)  # z = Σ x + z / 2
    >>> keras.ops.convert_to_numpy(layer(np.ones((2, 3)))).round(2).tolist()
    [[6.0], [6.0]]
    """

    def __init__(
        self,
        cell: keras.Layer,
        solver: Solver = "anderson",
        tolerance: float = 1e-4,
        max_iterations: int = 50,
        adjoint_solver: LinearSolver = "gmres",
        unconverged: Literal["warn", "error", "ignore"] = "warn",
        state_shape: Sequence[int] | None = None,
        **kwargs: Any,
    ):
        _check_cell(cell)
        checks.choice("solver", solver, NONLINEAR)
        checks.choice("adjoint_solver", adjoint_solver, SOLVERS)
        checks.choice("unconverged", unconverged, ("warn", "error", "ignore"))
        tolerance = checks.number("tolerance", tolerance, above=0, below=1)
        max_iterations = checks.count("max_iterations", max_iterations)
        several = isinstance(state_shape, (list, tuple)) and all(map(checks.is_integer, state_shape))
        if state_shape is not None and not (several and all(size > 0 for size in state_shape)):
            raise checks.invalid("state_shape", "a shape without the batch, or None", state_shape)
        super().__init__(**{"autocast": False, "dtype": cell.dtype_policy, **kwargs})
        self.cell = cell
        self.solver = solver
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.adjoint_solver = adjoint_solver
        self.unconverged = unconverged
        self.state_shape = None if state_shape is None else tuple(state_shape)
        self.is_watched = False
        self._heard = np.zeros(len(COUNTS))
        # A TensorFlow graph cannot report them otherwise.
        self._counts = self.add_weight(
            shape=(len(COUNTS),), initializer="zeros", trainable=False, aggregation="mean", name="counts"
        )

    def build(self, input_shape: Shapes) -> None:
        """Builds the cell, and checks what it returns."""
        x = keras.KerasTensor(input_shape, dtype=self.compute_dtype)
        z = keras.KerasTensor((input_shape[0], *self._state(input_shape)), dtype=self.compute_dtype)
        outputs = self.cell(*self._arguments(x, z))
        received = tuple(outputs.shape) if isinstance(outputs, keras.KerasTensor) else f"{outputs!r}"
        if received != tuple(z.shape):
            raise ValueError(
                f"The cell `{self.cell.name}` of `{self.name}` must return one tensor like z. "
                f"Expected shape {tuple(z.shape)}. Received: {received}, for x with shape {tuple(x.shape)}. Change the "
                "cell, or give the shape of z as `state_shape`."
            )

    def call(self, inputs: Structure, training: bool | None = None) -> Structure:
        """The fixed point, like z."""
        if keras_private.asks_for_shapes():  # Torch asks with tensors of arbitrary content.
            return ops.zeros(self.compute_output_shape(inputs.shape), self.compute_dtype)
        return self.find(inputs, bool(training))

    def find(self, x: Structure, training: bool) -> Tensor:
        """The fixed point, differentiable in `x` and the weights. Updates the state of the cell, once."""
        values = self._values()
        solution = self._solve(x, values, training)
        # What follows from the last evaluation is more exact than the iterate at which it was made; in a solve that
        # failed, nobody knows.
        follows = ops.logical_and(solution.converged, ops.all(ops.isfinite(solution.proposal), axis=-1))
        rows = ops.where(ops.expand_dims(follows, -1), solution.proposal, solution.value)
        value = ops.reshape(ops.cast(rows, self.compute_dtype), (-1, *self._state(x.shape)))
        moving = [i for i, (variable, _) in enumerate(values) if variable.trainable]

        def function(points: list, z: Tensor) -> Tensor:
            chosen = list(values)
            for i, point in zip(moving, points[1:], strict=True):
                chosen[i] = (values[i][0], point)
            with keras.StatelessScope(state_mapping=chosen):
                return self._evaluate(points[0], z, training)

        def frozen(z: Tensor) -> Pushforward:
            context = Context(training, "coupled" if training else "moving", batch=ops.shape(z)[0])
            with keras.StatelessScope(state_mapping=values):
                return freeze(self.cell, *self._arguments(x, z), context=context)[1]

        def pull(z: Tensor, v: Tensor) -> Tensor:
            cell = frozen(z)
            residuals = [ops.expand_dims(residual, 0) for residual in cell.residuals]
            loop = self._loop(z, cell.examples == "coupled")
            return derivatives.close(cell, ops.expand_dims(v, 0), residuals, loop, adjoint=True)[0]

        coupled = keras.backend.backend() == "jax" and frozen(value).examples == "coupled"
        points = [x, *(values[i][1] for i in moving)]
        z = derivatives.at_fixed_point(value, points, function, pull, self._loop(value, coupled))
        # Once for its effects (statistics, seeds, activity losses) and for the residual.
        image = ops.stop_gradient(self._evaluate(x, z, training))
        residual = relative_residual(rows, ops.cast(ops.reshape(image, ops.shape(rows)), rows.dtype))
        z = self._poisoned(z, ops.reshape(solution.converged, (-1, *[1] * (len(z.shape) - 1))))
        parts = [ops.ones_like(residual), solution.iterations, residual, ops.logical_not(solution.converged)]
        self._tell([*(ops.sum(ops.cast(part, "float32")) for part in parts), 0.0])
        return z

    def solution(self, inputs: Structure, training: bool = False) -> Solution:
        """What the solver finds: it has no derivative, and no state is updated.

        Args:
            inputs: x.
            training: whether the cell runs as in training.

        Returns:
            The iterate with the smallest residual, `(B, n)`, flattened; each `(B,)` its residual, its iterations and
            whether it converged; and the iterate that follows, `(B, n)`, which the layer returns if it converged.
        """
        return self._solve(ops.convert_to_tensor(inputs, self.compute_dtype), self._values(), training)

    def freeze(self, x: Structure, z: Tensor, context: Context) -> ImplicitPushforward:
        """The layer frozen at the fixed point z."""
        assert context.linearize is not None
        _, cell = context.linearize(self.cell, *self._arguments(x, z))
        return ImplicitPushforward(z, cell, self._loop(z, cell.examples == "coupled"))

    def take_counts(self) -> dict[str, float]:
        """What was counted since the last call, by the names in `COUNTS`."""
        derivatives.wait()
        counts = self._heard + ops.convert_to_numpy(self._counts)
        self._heard[:] = 0
        self._counts.assign(ops.zeros((len(COUNTS),)))
        return dict(zip(COUNTS, counts.tolist(), strict=True))

    def _values(self) -> list:
        """The variables of the cell with their current values; of seeds and statistics these are copies."""
        return [(v, v.value if v.trainable else ops.stop_gradient(ops.copy(v.value))) for v in self.cell.variables]

    def _solve(self, x: Structure, values: list, training: bool) -> Solution:
        x = ops.stop_gradient(x)
        stopped = [(variable, ops.stop_gradient(value)) for variable, value in values]
        shape = (-1, *self._state(x.shape))
        dtype = keras.backend.result_type(self.compute_dtype, "float32")

        def function(rows: Tensor) -> Tensor:
            z = ops.reshape(ops.cast(rows, self.compute_dtype), shape)
            # Each evaluation has a scope: dropout has the same mask in all, and no state changes.
            with keras.StatelessScope(state_mapping=stopped):
                return ops.cast(ops.reshape(self._evaluate(x, z, training), (-1, math.prod(shape[1:]))), dtype)

        start = ops.zeros((ops.shape(x)[0], math.prod(shape[1:])), dtype)
        with derivatives.unrecorded():
            return find_fixed_point(function, start, self.solver, self.tolerance, self.max_iterations)

    def _loop(self, z: Tensor, coupled: bool) -> Callable:
        """The solver of `w = rhs + A w`, for each example; if A couples them, for the batch as a whole."""

        def loop(matvec: Callable, rhs: Tensor) -> Tensor:
            dtype = keras.backend.result_type(rhs.dtype, "float32")
            probes = rhs.shape[0] if len(rhs.shape) > len(z.shape) else 1
            shape = (probes, -1) if coupled else (-1, math.prod(z.shape[1:]))

            def product(rows: Tensor) -> Tensor:
                image = matvec(ops.reshape(ops.cast(rows, rhs.dtype), ops.shape(rhs)))
                return start + ops.cast(ops.reshape(image, shape), dtype)

            start = ops.cast(ops.reshape(rhs, shape), dtype)
            scale = ops.norm(start, axis=-1)
            found = find_fixed_point(product, start, self.adjoint_solver, self.tolerance, self.max_iterations, scale)
            value = self._poisoned(found.value, ops.expand_dims(found.converged, -1))
            failed = ops.sum(ops.cast(ops.logical_not(found.converged), "float32"))
            self._tell([0.0, 0.0, 0.0, 0.0, failed])
            return ops.cast(ops.reshape(value, ops.shape(rhs)), rhs.dtype)

        return loop

    def _poisoned(self, tensor: Tensor, converged: Tensor) -> Tensor:
        # A product, so that the gradient is NaN too.
        if self.unconverged != "error":
            return tensor
        return tensor * ops.cast(ops.where(converged, 1.0, math.nan), tensor.dtype)

    def _tell(self, counts: list) -> None:
        derivatives.tell(ops.stack([ops.cast(count, "float32") for count in counts]), self._hear, self._counts)
        if derivatives.is_graph() and self.unconverged == "warn" and not self.is_watched:
            self.is_watched = True
            warnings.warn(
                f"`{self.name}` is compiled into a TensorFlow graph, which cannot warn where it does not converge. "
                "Pass a `jvpreg.callbacks.FixedPointMonitor` to `fit`, or give the layer another `unconverged`.",
                stacklevel=2,
            )

    def _hear(self, counts: Tensor, at_once: bool) -> None:
        self._heard += np.asarray(counts)
        examples, iterations, residual, failed, linear = (float(count) for count in counts)
        if not failed and not linear:
            return
        told = (
            f"`{self.name}` has not converged in {failed:.0f} of {examples:.0f} examples: mean residual "
            f"{residual / examples:.1e} after {iterations / examples:.1f} iterations in the mean."
            if failed
            else f"{linear:.0f} linear solve(s) for derivatives of `{self.name}` have not converged: these are wrong."
        )
        told += (
            f" Expected a residual of at most {self.tolerance:.0e} within {self.max_iterations} iterations. Raise "
            "`max_iterations` or `tolerance`, or make the cell more of a contraction "
            "(`jvpreg.regularizers.FixedPointJacobianNorm`)."
        )
        if self.unconverged == "error" and at_once:
            raise FloatingPointError(told)
        if self.unconverged == "warn" and not self.is_watched:
            warnings.warn(told, stacklevel=2)

    def _evaluate(self, x: Structure, z: Tensor, training: bool) -> Tensor:
        takes_training = "training" in call_signature(self.cell).parameters
        keywords = {"training": training} if takes_training else {}
        return ops.cast(self.cell(*self._arguments(x, z), **keywords), self.compute_dtype)

    def _arguments(self, x: Structure, z: Tensor) -> tuple:
        """The arguments with which the cell is called."""
        return (x, z) if _takes_two(self.cell) else ([x, z],)

    def _state(self, input_shape: Shapes) -> tuple[int, ...]:
        """The shape of z, without the batch."""
        shape = self.state_shape
        if shape is None:
            shape = tuple((self.cell.inputs[1].shape if is_graph(self.cell) else input_shape)[1:])
        if None in shape:
            raise ValueError(
                f"The shape of z of `{self.name}` is not known. Expected all its sizes but the batch's: pass "
                f"`state_shape`. Received: {shape}"
            )
        return shape

    def compute_output_shape(self, input_shape: Shapes) -> Shapes:
        """The shape of z."""
        return (input_shape[0], *self._state(input_shape))

    def get_config(self) -> Config:
        """The arguments of `__init__`."""
        return {
            **super().get_config(),
            "cell": keras.saving.serialize_keras_object(self.cell),
            "solver": self.solver,
            "tolerance": self.tolerance,
            "max_iterations": self.max_iterations,
            "adjoint_solver": self.adjoint_solver,
            "unconverged": self.unconverged,
            "state_shape": self.state_shape,
        }

    @classmethod
    def from_config(cls, config: Config) -> "FixedPoint":
        """The layer that `get_config` described."""
        return cls(**{**config, "cell": keras.saving.deserialize_keras_object(config["cell"])})


@register_rule(FixedPoint)
def fixed_point(layer: keras.Layer, x: Structure, context: Context) -> tuple[Tensor, ImplicitPushforward]:
    """`w = ∂ₓf u + ∂_z f w`, with the cell frozen at a fixed point that moves with the weights."""
    parts = keras_private.layers_within(layer.cell)
    normalized = any(isinstance(part, keras.layers.BatchNormalization) for part in parts)
    if normalized and context.training and context.batch_statistics == "moving":
        raise NotImplementedError(
            f"The cell of `{layer.name}` runs with the statistics of the batch in training. Expected "
            '`batch_statistics="frozen"` or "coupled". Received: "moving"'
        )
    values = layer._values()
    z = layer.find(x, context.training)
    # The cell has run already: freezing it once more at z updates no state.
    with keras.StatelessScope(state_mapping=values):
        return z, layer.freeze(x, z, context)


def _takes_two(cell: keras.Layer) -> bool:
    """Whether the cell's `call` takes x and z as two arguments, and not as a list."""
    parameters = call_signature(cell).parameters.values()
    own = [p for p in parameters if p.name not in ("training", "mask") and p.default is p.empty and p.kind <= 1]
    return not is_graph(cell) and len(own) == 2


def _check_cell(cell: keras.Layer) -> None:
    if not isinstance(cell, keras.Layer):
        raise checks.invalid("cell", "a Keras model or layer of x and z", cell)
    count = len(cell.inputs) if is_graph(cell) else 2
    if count != 2:
        raise ValueError(
            f"Invalid value for argument `cell`. Expected a model of two inputs, x and z. Received: `{cell.name}`, "
            f"which has {count}."
        )
