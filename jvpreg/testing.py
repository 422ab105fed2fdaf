"""Checks that a pushforward rule is right, for the package's rules and for a user's own."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from jvpreg.common import checks, keras_private
from jvpreg.common.typing import Seed, Shapes, Structure, Tensor
from jvpreg.engine.inputs import call_signature
from jvpreg.engine.transpose import transpose
from jvpreg.estimators.norms import squared_norm
from jvpreg.linearization import Linearization
from jvpreg.products import BatchStatistics, linearize

# The step of the differences, in float64. A penalty is larger than its products: its rounding needs a longer step.
STEP = 1e-6
PENALTY_STEP = 1e-5


def check_rule(
    layer: keras.Layer,
    input_shape: Shapes,
    *,
    batch_size: int = 3,
    training: bool = False,
    batch_statistics: BatchStatistics | None = None,
    jit: bool = False,
    reference: Callable | None = None,
    tolerance: float = 1e-10,
    seed: int = 0,
) -> None:
    """Checks a layer's rule, in float64: one line tests a rule that you wrote.

    Checks, in this order: the primal against the layer's own call; the pullback against un-jitted autodiff; the
    pushforward, and that of each weight, against central finite differences; several probes against one; linearity;
    adjointness `⟨J u, v⟩ = ⟨u, Jᵀ v⟩`; completeness `f(x) = J x + Σ contributions`; one example taken out of the
    batch; and the gradient of the penalty `‖J u‖²` by the input and the weights against central finite differences.

    Args:
        layer: a layer, which is copied through its config, in float64, with new random weights; or a model, which is
            used as it is and must be of float64.
        input_shape: without the batch; a list of shapes for several inputs.
        batch_size: B.
        training: as in `linearize`.
        batch_statistics: as in `linearize`.
        jit: whether the engine runs compiled (XLA; `torch.compile`). The reference never does.
        reference: `reference(*inputs) -> outputs`, the map whose Jacobian is expected; by default the layer itself.
        tolerance: the largest relative error. Only for finite differences it is always 1e-6.
        seed: of inputs, weights and directions.

    Raises:
        AssertionError: the rule is wrong; the message says which check failed.
        RuntimeError: the backend cannot compute in float64.

    Example:

    >>> import keras, jvpreg
    >>> jvpreg.testing.check_rule(keras.layers.Dense(4, activation="tanh"), (3,))
    """
    if not isinstance(layer, keras.Layer):
        raise checks.invalid("layer", "a Keras layer or model", layer)
    shapes = input_shape if isinstance(input_shape, list) else [input_shape]
    if not shapes or not all(isinstance(s, (tuple, list)) and all(map(checks.is_integer, s)) for s in shapes):
        raise checks.invalid("input_shape", "a shape without the batch, or a list of them", input_shape)
    checks.count("batch_size", batch_size)
    checks.boolean("jit", jit)
    checks.function("reference", reference, "a function of the inputs", optional=True)
    checks.number("tolerance", tolerance, above=0)
    checks.seed("seed", seed)
    with float64():
        _check_rule(layer, input_shape, batch_size, training, batch_statistics, jit, reference, tolerance, seed)


def _check_rule(
    layer: keras.Layer,
    input_shape: Shapes,
    batch_size: int,
    training: bool,
    batch_statistics: BatchStatistics | None,
    jit: bool,
    reference: Callable | None,
    tolerance: float,
    seed: Seed,
) -> None:
    shapes = [input_shape] if isinstance(input_shape, tuple) else list(input_shape)
    random = np.random.default_rng(seed)
    if not isinstance(layer, keras.Model):
        layer = type(layer).from_config({**layer.get_config(), "dtype": "float64"})
    inputs = [ops.convert_to_tensor(random.normal(size=(batch_size, *shape))) for shape in shapes]
    packed = inputs if len(inputs) > 1 else inputs[0]
    layer(packed)
    for variable in layer.variables:
        if "seed" not in variable.path:
            low = 0.5 if "variance" in variable.path else -0.8
            variable.assign(random.uniform(low, low + 1.6, size=variable.shape))
    case = _Case(layer, inputs, training, batch_statistics, reference, random, tolerance)
    run = compiled if jit else lambda function: function
    case.check_products(run)
    case.check_weights(run)
    case.check_penalty_gradient(run)


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """A context in which Keras computes in float64: models made in it are of float64, on every backend.

    Raises:
        RuntimeError: the backend cannot.

    Example:

    >>> import keras, jvpreg
    >>> with jvpreg.testing.float64():
    ...     keras.layers.Dense(2).compute_dtype
    'float64'
    """
    if keras.backend.standardize_dtype(ops.convert_to_tensor(np.zeros(1)).dtype) != "float64":
        raise RuntimeError(
            "Checks are computed in float64, which this backend has turned off. On JAX, call "
            '`jax.config.update("jax_enable_x64", True)` first, or set JAX_ENABLE_X64=1.'
        )
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    try:
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
        with keras_private.float64_kept():
            yield
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)


class _Case:
    """A layer with its inputs and everything that is drawn for one check."""

    def __init__(
        self,
        layer: keras.Layer,
        inputs: list,
        training: bool,
        batch_statistics: BatchStatistics | None,
        reference: Callable | None,
        random: np.random.Generator,
        tolerance: float,
    ):
        self.layer, self.inputs = layer, inputs
        self.training, self.batch_statistics = training, batch_statistics
        self.reference = reference or self._call
        self.tolerance = tolerance
        # Every evaluation starts from these values, so that seeds and moving averages are the same in each.
        self.variables = list(layer.variables)
        self.values = [ops.stop_gradient(ops.copy(variable.value)) for variable in self.variables]
        self.u, self.w = ([self._draw(random, x) for x in inputs] for _ in range(2))
        self.outputs = tree.flatten(self._stateless(self.values, lambda: self._call(*inputs)))
        self.v = [self._draw(random, y) for y in self.outputs]

    @staticmethod
    def _draw(random: np.random.Generator, like: Structure) -> Tensor:
        return ops.convert_to_tensor(random.normal(size=like.shape))

    def _call(self, *inputs: Structure) -> Structure:
        takes_training = "training" in call_signature(self.layer).parameters
        keywords = {"training": self.training} if takes_training else {}
        return self.layer(list(inputs) if len(inputs) > 1 else inputs[0], **keywords)

    def _stateless(self, values: Sequence[Tensor], function: Callable) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(self.variables, values, strict=True))):
            return function()

    def _linearize(self, inputs: Structure) -> Linearization:
        packed = list(inputs) if len(inputs) > 1 else inputs[0]
        return linearize(self.layer, packed, training=self.training, batch_statistics=self.batch_statistics)

    def check_products(self, compiled: Callable) -> None:
        """Everything that compares products with the Jacobian at one point."""
        u, w, v, count = self.u, self.w, self.v, len(self.inputs)

        def products(values: Sequence[Tensor], inputs: Structure, u: list, w: list, v: list) -> list:
            def run() -> list:
                lin = self._linearize(inputs)
                self._check_shapes("the primal", tree.flatten(lin.outputs), self.outputs)
                sum_of_both = [2.0 * a - 3.0 * b for a, b in zip(u, w, strict=True)]
                two_probes = [ops.stack([a, b]) for a, b in zip(u, w, strict=True)]
                last = [] if lin.couples_examples else lin.take([u[0].shape[0] - 1]).jvp(_pack([a[-1:] for a in u]))
                return [
                    tree.flatten(result)
                    for result in (
                        lin.outputs,
                        lin.jvp(_pack(u)),
                        lin.jvp(_pack(two_probes)),
                        lin.jvp(_pack(sum_of_both)),
                        lin.vjp(tree.pack_sequence_as(lin.outputs, v)),
                        lin.jvp(_pack(lin.inputs), taps=lin.intercepts),
                        last,
                    )
                ]

            return self._stateless(values, run)

        results = compiled(products)(self.values, self.inputs, u, w, v)
        outputs, ju, both, combined, jtv, complete, last = [[_numpy(leaf) for leaf in result] for result in results]

        def reference(inputs: Structure) -> list:
            return tree.flatten(self._stateless(self.values, lambda: self.reference(*inputs)))

        self._compare("the primal", outputs, self.outputs)
        self._compare("the pullback, against autodiff", jtv, transpose(reference, self.inputs, v))
        ahead, behind = (
            reference([x + sign * STEP * a for x, a in zip(self.inputs, u, strict=True)]) for sign in (1, -1)
        )
        slopes = [(_numpy(a) - _numpy(b)) / (2 * STEP) for a, b in zip(ahead, behind, strict=True)]
        self._compare("the pushforward, against finite differences", ju, slopes, 1e-6)
        pairs = [np.stack([a, b]) for a, b in zip(ju, [y[1] for y in both], strict=True)]
        self._compare("two probes at once, against one", both, pairs)
        self._compare("linearity", combined, [2.0 * pair[0] - 3.0 * pair[1] for pair in both])
        self._compare("adjointness ⟨J u, v⟩ = ⟨u, Jᵀ v⟩", [_inner(ju, v)], [_inner(u, jtv)], scale=_norm(ju) * _norm(v))
        self._compare("completeness f(x) = J x + Σ contributions", complete, self.outputs)
        if last:
            self._compare("one example taken out of the batch", last, [y[-1:] for y in ju])
        assert len(jtv) == count

    def check_weights(self, compiled: Callable) -> None:
        """The pushforward of each weight that the rules know, one probe each; of the input; and of all at once."""
        known = {
            id(variable) for variable in self._stateless(self.values, lambda: self._linearize(self.inputs).weights)
        }
        indices = [i for i, variable in enumerate(self.variables) if id(variable) in known]
        self._check_no_weight_is_missing(known)
        if not indices:
            return
        count = len(indices)
        random = np.random.default_rng(2)
        moved = [random.normal(size=self.variables[i].shape) for i in indices]

        def probes(tangent: Tensor, own: int) -> Tensor:
            """The tangent in a probe of its own, and in the last probe, which has all of them."""
            stacked = np.zeros((count + 2, *np.shape(tangent)))
            stacked[own] = stacked[-1] = tangent
            return ops.convert_to_tensor(stacked)

        u = [probes(_numpy(a), count) for a in self.u]
        tangents = [probes(tangent, k) for k, tangent in enumerate(moved)]

        def products(values: Sequence[Tensor], inputs: Structure, u: list, tangents: list) -> list:
            def run() -> list:
                pairs = [(self.variables[i], tangent) for i, tangent in zip(indices, tangents, strict=True)]
                return tree.flatten(self._linearize(inputs).jvp(_pack(u), weights=pairs))

            return self._stateless(values, run)

        try:
            received = [_numpy(leaf) for leaf in compiled(products)(self.values, self.inputs, u, tangents)]
        except Exception as error:
            error.add_note(
                f"{self._name}: this was raised by a part of its weights, which takes a tangent `(P, *weight.shape)` "
                "and residuals `(1, B, …)`. `jvpreg.rules.align` gives a tangent the axes that it lacks."
            )
            raise
        for k, (i, tangent) in enumerate(zip(indices, moved, strict=True)):
            pair = []
            for sign in (1, -1):
                values = list(self.values)
                values[i] = self.values[i] + sign * STEP * tangent
                outputs = self._stateless(values, lambda: self.reference(*self.inputs))
                pair.append([_numpy(leaf) for leaf in tree.flatten(outputs)])
            slopes = [(ahead - behind) / (2 * STEP) for ahead, behind in zip(*pair, strict=True)]
            name = f"the pushforward of {self.variables[i].path}, against finite differences"
            # Differences of the outputs are no better than the rounding of the outputs over the step.
            scale = _norm(slopes) + 1e-2 * _norm(self.outputs)
            self._compare(name, [leaf[k] for leaf in received], slopes, 1e-6, scale)
        self._compare(
            "the tangents of the input and the weights at once, against each by itself",
            [leaf[-1] for leaf in received],
            [np.sum(leaf[:-1], axis=0) for leaf in received],
        )

    def _check_no_weight_is_missing(self, known: set[int]) -> None:
        """Raises if the output depends on a trainable weight that has no part in the rule."""
        for i, variable in enumerate(self.variables):
            if not variable.trainable or id(variable) in known:
                continue
            moved = [value + STEP if j == i else value for j, value in enumerate(self.values)]
            outputs = tree.flatten(self._stateless(moved, lambda: self.reference(*self.inputs)))
            assert all(np.array_equal(_numpy(a), _numpy(b)) for a, b in zip(outputs, self.outputs, strict=True)), (
                f"{self._name}: the output depends on `{variable.path}`, and the pushforward has no part for it. "
                "Expected a pair `(variable, part)` among its `weights`."
            )

    def check_penalty_gradient(self, compiled: Callable) -> None:
        """The gradient of `mean ‖J u‖²` by inputs and weights, along random directions, by finite differences."""
        trainable = [i for i, variable in enumerate(self.variables) if variable.trainable]

        def penalty(points: list) -> list:
            inputs, weights = points[: len(self.inputs)], points[len(self.inputs) :]
            values = list(self.values)
            for i, weight in zip(trainable, weights, strict=True):
                values[i] = weight

            def run() -> list:
                products = self._linearize(inputs).jvp(_pack([ops.expand_dims(a, 0) for a in self.u]))
                return [ops.mean(squared_norm(products))]

            return self._stateless(values, run)

        points = [*self.inputs, *(self.values[i] for i in trainable)]
        gradient = compiled(lambda points: transpose(penalty, points, [ops.ones((), "float64")]))(points)
        gradient = [_numpy(part) for part in gradient]
        # On JAX, what is not compiled as a whole is compiled operation by operation, which takes longer.
        evaluate = compiled(penalty) if keras.backend.backend() == "jax" else penalty
        random = np.random.default_rng(1)
        # Each input and each weight by itself, so that an error in one is not lost among the others.
        for moved in range(len(points)):
            direction = random.normal(size=points[moved].shape)

            def along(distance: float, moved: int = moved, direction: Tensor = direction) -> float:
                shifted = [x + distance * direction if i == moved else x for i, x in enumerate(points)]
                return float(_numpy(evaluate(shifted)[0]))

            slope = (along(PENALTY_STEP) - along(-PENALTY_STEP)) / (2 * PENALTY_STEP)
            is_input = moved < len(self.inputs)
            name = f"input {moved}" if is_input else self.variables[trainable[moved - len(self.inputs)]].path
            received = np.sum(gradient[moved] * direction)
            self._compare(
                f"the penalty's gradient by {name}, against finite differences",
                [received],
                [slope],
                1e-6,
                # Differences of a penalty are no better than the rounding of the penalty over the step.
                scale=abs(slope) + 1e-4 * (1e-3 + abs(along(0.0))),
            )

    def _compare(
        self,
        what: str,
        received: Sequence,
        expected: Sequence,
        tolerance: float | None = None,
        scale: float | None = None,
    ) -> None:
        tolerance = self.tolerance if tolerance is None else tolerance
        self._check_shapes(what, received, expected)
        for a, b in zip(received, expected, strict=True):
            a, b = _numpy(a), _numpy(b)
            size = max(_norm([b]), 1e-30) if scale is None else max(scale, 1e-30)
            error = _norm([a - b]) / size
            if _norm([b]) == 0 and scale is None:
                error = _norm([a])
            assert error <= tolerance, (
                f"{self._name}: wrong in {what}. Expected a relative error of at most {tolerance:.0e}. "
                f"Received: {error:.2e}"
            )

    def _check_shapes(self, what: str, received: Sequence, expected: Sequence) -> None:
        shapes = [[tuple(np.shape(tensor)) for tensor in tensors] for tensors in (received, expected)]
        assert shapes[0] == shapes[1], (
            f"{self._name}: wrong shape in {what}. Expected {str(shapes[1])[1:-1]}. Received: {str(shapes[0])[1:-1]}"
        )

    @property
    def _name(self) -> str:
        return f"The rule of `{self.layer.name}` ({type(self.layer).__name__})"


def _pack(leaves: list) -> Structure:
    return leaves[0] if len(leaves) == 1 else leaves


def _numpy(tensor: Tensor) -> np.ndarray:
    if isinstance(tensor, (float, np.ndarray, np.generic)):
        # Not by way of a tensor: backends convert a Python float to float32.
        return np.asarray(tensor)
    return np.asarray(ops.convert_to_numpy(ops.stop_gradient(ops.convert_to_tensor(tensor))))


def _inner(left: Sequence, right: Sequence) -> float:
    return float(sum(np.sum(_numpy(a) * _numpy(b)) for a, b in zip(left, right, strict=True)))


def _norm(tensors: Sequence) -> float:
    return float(np.sqrt(sum(np.sum(np.square(_numpy(tensor))) for tensor in tensors)))


def compiled(function: Callable) -> Callable:
    """The function, compiled by the backend: XLA on TensorFlow and JAX, `torch.compile` on Torch."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    if backend == "jax":
        import jax

        return jax.jit(function)
    import torch

    return torch.compile(function)
