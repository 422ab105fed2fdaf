"""What the parts of a training step share, in which order kinds of steps are taken, and how examples are weighed."""

import contextlib
import threading

from keras import ops

from jvpreg.linearization import Linearization


class RunningStep(threading.local):
    """What `train_step`, `call` and `compute_loss` of one step share. tf.distribute runs a thread a replica."""

    active = False
    penalized = False
    due: bool | None = None
    linearization: Linearization | None = None

    @contextlib.contextmanager
    def scheduled(self, due: bool):
        """Within it, it is known whether a step has penalties."""
        self.due = due
        try:
            yield
        finally:
            self.due = None

    @contextlib.contextmanager
    def step(self, penalized: bool):
        """Within it a step is taken, with or without penalties."""
        self.active, self.penalized = True, penalized
        try:
            yield
        finally:
            self.active, self.penalized, self.linearization = False, False, None


def alternate(functions: dict, interval: int, first: int):
    """Runs `functions[True]` every `interval`-th time and `functions[False]` else; `first` steps were taken before."""
    step = first

    def train_function(*args):
        nonlocal step
        result = functions[step % interval == 0](*args)
        step += 1  # Only now: at the end of the data there was no step.
        return result

    return train_function


def example_weights(sample_weight):
    """Weights `(B,)`, or None where there are none, or none that belong to examples as a whole."""
    if sample_weight is None or isinstance(sample_weight, (dict, list, tuple)):
        return None
    weights = ops.convert_to_tensor(sample_weight)
    if len(weights.shape) == 2 and weights.shape[1] == 1:
        weights = ops.squeeze(weights, 1)
    return weights if len(weights.shape) == 1 else None


def weighted_mean(penalty, weights):
    """As Keras reduces a loss: the weighted sum over the number of examples."""
    return ops.mean(penalty if weights is None else penalty * ops.cast(weights, penalty.dtype))
