"""One check of a rule: everything that is drawn for it, and its comparisons."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from jvpreg.common.typing import Structure, Tensor
from jvpreg.engine.inputs import call_signature
from jvpreg.engine.node import Node
from jvpreg.engine.transpose import transpose
from jvpreg.estimators.norms import squared_norm
from jvpreg.linearization import Linearization
from jvpreg.products import BatchStatistics, linearize
from jvpreg.rules.contract import Affine
from jvpreg.rules.registry import find_rule

# The step of the differences, in float64. A penalty is larger than its products: its rounding needs a longer step.
STEP = 1e-6
PENALTY_STEP = 1e-5


class Case:
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

    def _outputs_after(self, i: int, change: Any) -> list[np.ndarray]:
        """The reference's outputs with weight i changed by so much."""
        values = [value + change if j == i else value for j, value in enumerate(self.values)]
        outputs = self._stateless(values, lambda: self.reference(*self.inputs))
        return [_numpy(leaf) for leaf in tree.flatten(outputs)]

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
                        [pair for node in lin.nodes for pair in _scaled_kernels(node)],
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
        scaled, outputs, ju, both, combined, jtv, complete, last = ([_numpy(t) for t in found] for found in results)

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
        self._compare("a kernel with the channels of its output multiplied", scaled[::2], scaled[1::2])
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
                lin = self._linearize(inputs)
                whole, last = lin.jvp(_pack(u), weights=pairs), []
                if not lin.couples_examples:
                    last = lin.take([u[0].shape[1] - 1]).jvp(_pack([a[:, -1:] for a in u]), weights=pairs)
                return [tree.flatten(whole), tree.flatten(last)]

            return self._stateless(values, run)

        try:
            results = compiled(products)(self.values, self.inputs, u, tangents)
        except Exception as error:
            error.add_note(
                f"{self._name}: this was raised while the parts of its weights ran. Each takes a tangent "
                "`(P, *weight.shape)` and residuals `(1, B, …)`; `jvpreg.rules.align` gives a tangent missing axes."
            )
            raise
        received, last = ([_numpy(leaf) for leaf in found] for found in results)
        for k, (i, tangent) in enumerate(zip(indices, moved, strict=True)):
            ahead, behind = (self._outputs_after(i, sign * STEP * tangent) for sign in (1, -1))
            slopes = [(a - b) / (2 * STEP) for a, b in zip(ahead, behind, strict=True)]
            name = f"the pushforward of {self.variables[i].path}, against finite differences"
            # Differences of the outputs are no better than the rounding of the outputs over the step.
            scale = _norm(slopes) + 1e-2 * _norm(self.outputs)
            self._compare(name, [leaf[k] for leaf in received], slopes, 1e-6, scale)
        self._compare(
            "the tangents of the input and the weights at once, against each by itself",
            [leaf[-1] for leaf in received],
            [np.sum(leaf[:-1], axis=0) for leaf in received],
        )
        if last:
            name = "the tangents of weights, for one example taken out of the batch"
            self._compare(name, last, [leaf[:, -1:] for leaf in received], scale=_norm(received))

    def _check_no_weight_is_missing(self, known: set[int]) -> None:
        """Raises if the output depends on a trainable weight that has no part in the rule."""
        if find_rule(self.layer) is None:
            return  # The layer is opened up; what it computes from its weights alone is constant there.

        for i, variable in enumerate(self.variables):
            if not variable.trainable or id(variable) in known:
                continue
            pairs = zip(self._outputs_after(i, STEP), self._outputs_after(i, 0.0), strict=True)
            change = _norm([a - b for a, b in pairs])
            # A weight that does not matter changes no more than rounding does.
            assert change <= 1e-4 * STEP * _norm(self.outputs), (
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


def _scaled_kernels(node: Node) -> list:
    """Pairs of what an `Affine` of a node makes of its input if its channels are multiplied, by it and after it."""
    if not isinstance(node.pushforward, Affine) or node.pushforward.scaled is None:
        return []
    tangent, pairs = ops.expand_dims(node.inputs[0].primal, 0), []
    image = node.pushforward(tangent)
    for axis in range(1, len(image.shape) - 1):
        slope = ops.cast(ops.linspace(0.5, 1.5, image.shape[axis + 1]), image.dtype)
        scaled = node.pushforward.with_channels_scaled(slope, axis)
        if scaled is not None:
            along = ops.reshape(slope, [-1 if i == axis + 1 else 1 for i in range(len(image.shape))])
            pairs += [scaled(tangent), along * image]
    return pairs
