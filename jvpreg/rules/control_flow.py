"""Loops and branches of a `call` as operations: see `jvpreg.engine.control_flow`, and `jvpreg.rules.loops`.

Their bodies are graphs of operations, and what a body closes over is an input like any other.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops, tree

from jvpreg.common import keras_private
from jvpreg.rules.scanning import scan_steps


class Body:
    """A function of a loop or of a branch, as a graph.

    Args:
        graph: from the function's arguments, and then what it closes over, to a flat list of its outputs.
        num_arguments: how many of the inputs are arguments.
    """

    def __init__(self, graph: keras.Function, num_arguments: int):
        self.graph, self.num_arguments = graph, num_arguments
        self.of_elements = False  # as a map takes them

    def __call__(self, *tensors: Any) -> list:
        """The outputs, by the operations themselves."""
        return keras_private.run_graph(self.graph, list(tensors), lambda operation: operation)

    @property
    def variables(self) -> list:
        """The variables of the layers in it, and those that its operations take."""
        operations = self.graph.operations
        owned = [v for layer in operations if isinstance(layer, keras.Layer) for v in layer.variables]
        bodies = [v for inner in operations if isinstance(inner, ControlFlow) for v in inner.variables]
        taken = [leaf for operation in operations for leaf in tree.flatten(keras_private.last_call(operation))]
        found = [*owned, *bodies, *(leaf for leaf in taken if isinstance(leaf, keras.Variable))]
        return list({id(variable): variable for variable in found}.values())


class ControlFlow(keras.Operation):
    """An operation with bodies, called with tensors for their arguments and then for what they close over."""

    def __init__(self, *bodies: Body):
        super().__init__()
        self.bodies = bodies

    @property
    def variables(self) -> list:
        """The variables of its bodies, for autodiff."""
        found = [variable for body in self.bodies for variable in body.variables]
        return list({id(variable): variable for variable in found}.values())

    def closed_over(self, inputs: Sequence) -> list[list]:
        """What each body closes over: the last inputs."""
        counts = [len(body.graph.inputs) - body.num_arguments for body in self.bodies]
        ends = [len(inputs) - sum(counts[i:]) for i in range(len(counts) + 1)]
        return [list(inputs[start:end]) for start, end in itertools.pairwise(ends)]


class Scan(ControlFlow):
    """`ops.scan` or `ops.fori_loop`: a body that takes what is carried and an element, and returns both.

    Elements, and outputs of the steps, have the steps on their second axis if they have two: so the examples, which an
    element has on its first axis, are on the first axis here too.
    """

    def __init__(self, body: Body, num_carried: int, length: int | None, reverse: bool):
        super().__init__(body)
        self.num_carried, self.length, self.reverse = num_carried, length, reverse

    def axis(self, rank: int) -> int:
        """The axis of the steps in a tensor that has it."""
        return min(1, rank - 1)

    def compute_output_spec(self, *inputs):
        """Symbols for what `call` returns."""
        outputs = self.bodies[0].graph.outputs
        carried = [keras.KerasTensor(x.shape, x.dtype) for x in outputs[: self.num_carried]]
        return carried + [self._stacked(y) for y in outputs[self.num_carried :]]

    def _stacked(self, y):
        axis = self.axis(len(y.shape) + 1)
        return keras.KerasTensor((*y.shape[:axis], self.length, *y.shape[axis:]), y.dtype)

    def elements(self, inputs: Sequence) -> list:
        """The elements of all steps (T, …), in the order of the steps, and the number of each step."""
        given = inputs[self.num_carried : self.bodies[0].num_arguments]
        counted = ops.arange(self.length if self.length is not None else ops.shape(self.in_order(given[0]))[0])
        return [*map(self.in_order, given), counted]

    def in_order(self, tensor, probed: bool = False):
        """A tensor with the axis of the steps first, in their order. `probed`: whether the probes are first."""
        steps = ops.moveaxis(tensor, self.axis(len(tensor.shape) - probed) + probed, 0)
        return ops.flip(steps, axis=0) if self.reverse else steps

    def finish(self, steps, probed: bool = False):
        """`in_order` undone."""
        steps = ops.flip(steps, axis=0) if self.reverse else steps
        return ops.moveaxis(steps, 0, self.axis(len(steps.shape) - probed) + probed)

    def run(self, step: Callable, carried: list, elements: list, like: list) -> tuple:
        """What is carried at the end, and the outputs of all steps, of `step(carried, element)`."""
        return scan_steps(step, carried, elements, like)

    def call(self, *inputs):
        """The operation as Keras runs it, for autodiff."""
        (closed_over,), count = self.closed_over(inputs), self.num_carried

        def step(carried, now):
            outputs = self.bodies[0](*carried, *now[:-1], *closed_over)
            return outputs[:count], outputs[count:]

        elements, first = self.elements(inputs), list(inputs[:count])
        like = self.bodies[0](*first, *(x[0] for x in elements[:-1]), *closed_over)[count:]
        last, steps = self.run(step, first, elements, like)
        return [*last, *map(self.finish, steps)]


class Map(Scan):
    """`ops.map` or `ops.vectorized_map`: as a scan that carries nothing, and all along the first axis."""

    def __init__(self, body: Body, length: int | None, vectorized: bool):
        super().__init__(body, 0, length, False)
        body.of_elements = True
        self.vectorized = vectorized

    def axis(self, rank: int) -> int:
        """The axis of the elements."""
        return 0

    def run(self, step: Callable, carried: list, elements: list, like: list) -> tuple:
        """As of a scan; or of all elements at once."""
        if not self.vectorized:
            return super().run(step, carried, elements, like)
        return [], ops.vectorized_map(lambda now: step([], list(now))[1], elements)


class WhileLoop(ControlFlow):
    """`ops.while_loop`: a body and a condition on what is carried. Frozen, it has as many steps as were taken at x."""

    def __init__(self, body: Body, condition: Body, maximum: int | None):
        super().__init__(body, condition)
        self.maximum = maximum

    def compute_output_spec(self, *inputs):
        """Symbols for what `call` returns."""
        return [keras.KerasTensor(x.shape, x.dtype) for x in self.bodies[0].graph.outputs]

    def goes_on(self, carried, closed_over):
        """Whether there is another step, a tensor of one boolean."""
        return ops.cast(ops.reshape(self.bodies[1](*carried, *closed_over)[0], ()), "bool")

    def call(self, *inputs):
        """The operation as Keras runs it, for autodiff."""
        body, _ = self.bodies
        of_body, of_condition = self.closed_over(inputs)
        return list(
            ops.while_loop(
                lambda *carried: self.goes_on(carried, of_condition),
                lambda *carried: tuple(body(*carried, *of_body)),
                tuple(inputs[: body.num_arguments]),
                maximum_iterations=self.maximum,
            )
        )


class Switch(ControlFlow):
    """`ops.switch` or `ops.cond`: one of several bodies, by an index. Frozen, it is the body that was taken at x."""

    def compute_output_spec(self, index, *inputs):
        """Symbols for what `call` returns."""
        return [keras.KerasTensor(y.shape, y.dtype) for y in self.bodies[0].graph.outputs]

    def arguments(self, inputs: Sequence) -> list[list]:
        """The inputs of each body."""
        operands = list(inputs[: self.bodies[0].num_arguments])
        return [operands + closed_over for closed_over in self.closed_over(inputs)]

    def call(self, index, *inputs):
        """The operation as Keras runs it, for autodiff."""
        pairs = zip(self.bodies, self.arguments(inputs), strict=True)
        return choose(index, [lambda b=body, a=arguments: b(*a) for body, arguments in pairs])


def choose(index, branches: Sequence[Callable]):
    """What the branch of this index returns. As Keras has it: the first or last one of an index beyond them."""
    if len(branches) == 1:
        return branches[0]()
    # Not `ops.switch`, whose branches have no gradient under XLA on TensorFlow.
    return ops.cond(index <= 0, branches[0], lambda: choose(index - 1, branches[1:]))
