"""Steps with and without penalties: their order, and what the parts of one step share."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from jvpreg.common.typing import Structure
from jvpreg.regularizers.base import JacobianRegularizer


@dataclass
class Step:
    """A step of training or evaluation: `train_step` or `test_step` makes it, `call` fills it, `compute_loss` uses it.

    Attributes:
        penalized: whether the model may have penalties in this step; in training, they need not be due.
        due: whether they are due by the model's interval, if the host knows; otherwise None.
        inputs: the inputs of `call` at which the base was linearized.
        linearization: of the base; None if the base itself was run."""

    penalized: bool
    due: bool | None = None
    inputs: Structure | None = None
    linearization: Any = None  # `Any`: a penalty, which is asked for in steps that have it, takes it as given


class Alternating:
    """A train function that runs `functions[True]` in every `interval`-th step, and `functions[False]` in the others.

    The host counts the steps itself, so that it never waits for the device. Before its first step, which comes after
    callbacks have restored weights, and after each `recount`, it asks how many steps were taken.

    Args:
        functions: train functions, by whether a step has penalties.
        interval: of steps with penalties.
        taken: returns the number of steps taken so far, from the arguments of a train function.
    """

    def __init__(self, functions: dict[bool, Callable], interval: int, taken: Callable[..., int]):
        self._functions = functions
        self._interval = interval
        self._taken = taken
        self._step: int | None = None

    def recount(self) -> None:
        """Makes the host ask again for the number of steps, since weights were set or loaded."""
        self._step = None

    def __call__(self, *args: Any) -> Any:
        """Takes a step."""
        step = self._taken(*args) if self._step is None else self._step
        result = self._functions[step % self._interval == 0](*args)
        self._step = step + 1  # Only now: the data may have ended without a step.
        return result


class SteppedModel(keras.Model):
    """A model that counts its training steps, of which some have penalties.

    A subclass overrides `has_penalties`, and reads the `current_step` in `call` and `compute_loss`.

    Attributes:
        jacobian_regularizers: the penalties.
        jacobian_interval: k, if every k-th training step has the penalties.
        jacobian_evaluate: whether evaluation has them.
        always_penalized: whether training steps have other penalties even if those of the interval are not due.
        steps_taken: a variable, the number of training steps.
    """

    train_function: Any
    jacobian_regularizers: tuple[JacobianRegularizer, ...] = ()
    jacobian_interval = 1
    jacobian_evaluate = True
    always_penalized = False

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.steps_taken = self.add_weight(
            shape=(),
            initializer="zeros",
            dtype="int32",
            trainable=False,
            name="jacobian_step",
            autocast=False,
        )
        # tf.distribute runs one thread for each replica. Keras' own steps hand nothing from `call` to `compute_loss`.
        self._of_thread = threading.local()

    @property
    def has_penalties(self) -> bool:
        """Whether the model has any penalties, so that its steps differ from Keras' own."""
        raise NotImplementedError

    @property
    def current_step(self) -> Step | None:
        """The step that this thread is taking; None outside of steps."""
        return getattr(self._of_thread, "step", None)

    @contextlib.contextmanager
    def _taking(self, step: Step) -> Iterator[None]:
        """A context in which this thread is taking a step."""
        before, self._of_thread.step = self.current_step, step
        try:
            yield
        except StopIteration:
            # Not `from` it: a context manager takes that for the error which it handed on.
            raise RuntimeError("A step raised StopIteration, which would end `fit` as if the data had run out.")  # noqa: B904
        finally:
            self._of_thread.step = before

    def is_plain(self, step: Step) -> bool:
        """Whether a step is known to have no penalty, and running the base model is the faster way to take it.

        Under XLA and on JAX it is not faster: there the engine's max pooling has the cheaper gradient.
        """
        compiled_by_xla = keras.backend.backend() != "tensorflow" or self.jit_compile
        return step.due is False and not self.always_penalized and not compiled_by_xla

    def make_train_function(self, force: bool = False) -> Callable:
        """As Keras'. With an interval, it makes one function for steps with penalties and one for steps without.

        The host chooses between them, and counts the steps itself. Inside a compiled step the choice would be a
        conditional, and XLA on CPU runs the convolutions of a branch several times more slowly. The conditional is used
        if one function takes several steps, if nothing is compiled, and on Torch.

        Raises:
            ValueError: several replicas of `tf.distribute` would take several steps at once.
        """
        strategy = getattr(self, "distribute_strategy", None)  # a model has it on TensorFlow
        if self.steps_per_execution > 1 and strategy is not None and strategy.num_replicas_in_sync > 1:
            # In Keras 3.15 this fails for any model, at the first step: a placeholder of a conditional gets no value.
            raise ValueError(
                "Invalid value for argument `steps_per_execution`. Expected 1, since Keras cannot take several steps "
                f"at once on several replicas of tf.distribute. Received: {self.steps_per_execution}."
            )
        alone = self.run_eagerly or self.steps_per_execution > 1 or keras.backend.backend() == "torch"
        if not self.jacobian_regularizers or self.jacobian_interval == 1 or alone:
            return super().make_train_function(force)
        if self.train_function is None or force:
            functions = {due: self._train_function_when(due) for due in (True, False)}
            self.train_function = Alternating(functions, self.jacobian_interval, self.steps_before)
        return self.train_function

    def _train_function_when(self, due: bool) -> Callable:
        def train_step(*args: Any, **kwargs: Any) -> Any:
            with self._taking(Step(self.has_penalties, due)):
                return type(self).train_step(self, *args, **kwargs)

        # The only way to have two: Keras compiles this attribute, and JAX keeps one program for a method, however often
        # it is compiled.
        self.train_step = train_step  # type: ignore[method-assign]
        try:
            super().make_train_function(force=True)
        finally:
            del self.train_step
        return self.train_function

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        """One step of `fit`, as Keras does it on this backend."""
        with self._taking(self.current_step or Step(self.has_penalties)):
            return super().train_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """One step of `evaluate`, as Keras does it on this backend."""
        with self._taking(Step(self.has_penalties and self.jacobian_evaluate)):
            return super().test_step(*args, **kwargs)

    def steps_before(self, *args: Any) -> int:
        """The number of training steps taken before a train function runs with `args`."""
        if keras.backend.backend() == "jax":
            # Within `fit`, the variable is empty: its value is in the state that the step is given.
            place = [variable is self.steps_taken for variable in self.non_trainable_variables].index(True)
            return int(args[0][1][place])
        return int(ops.convert_to_numpy(self.steps_taken))

    def run_when_due(self, step: Step, compute: Callable, skip: Callable, training: bool) -> tuple:
        """Counts a training step, and computes its penalties if they are due.

        Args:
            step: the current step.
            compute: returns the penalties.
            skip: returns zeros with the same structure.
            training: whether the step is one of training; in evaluation they are always due.

        Returns:
            What `compute` or `skip` returned, 1 or 0 for which of them, and the number of the training step, from 1.
        """
        # A sum, and so a new tensor: the variable's own value would change with the assignment.
        number = self.steps_taken + 1
        if training:
            self.steps_taken.assign(number)
        if not training or self.jacobian_interval == 1:
            return compute(), 1.0, number
        if step.due is not None:
            return (compute(), 1.0, number) if step.due else (skip(), 0.0, number)
        due = ops.equal((number - 1) % self.jacobian_interval, 0)
        return ops.cond(due, compute, skip), ops.cast(due, "float32"), number

    def _recount_steps(self) -> None:
        if isinstance(self.train_function, Alternating):
            self.train_function.recount()

    def reset_metrics(self) -> None:
        """As Keras', which calls it before each epoch. A callback may have restored weights since the last one."""
        self._recount_steps()
        super().reset_metrics()

    def set_weights(self, weights: list) -> None:
        """As Keras'."""
        super().set_weights(weights)
        self._recount_steps()

    def set_state_tree(self, state_tree: Structure) -> None:
        """As Keras'."""
        super().set_state_tree(state_tree)
        self._recount_steps()

    def load_own_variables(self, store: Any) -> None:
        """As Keras'."""
        super().load_own_variables(store)
        self._recount_steps()
