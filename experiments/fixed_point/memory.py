"""The peak memory of training steps, each kind in a process of its own."""

import numpy as np

from experiments.benchmark.memory import added_peak
from experiments.fixed_point import network

STEPS = 2
KINDS = ("fixed point", "fixed point, picard", "unrolled")
"""By Anderson and GMRES; by plain iteration both ways; and without any solver."""
SMALLEST_TOLERANCE = 1e-30  # never met: all iterations are taken


def peak_bytes(kind: str, depth: int, width: int, batch_size: int) -> int:
    """Peak memory that training steps on CIFAR-sized noise add to what a process holds after its imports.

    Args:
        kind: one of `KINDS`.
        depth: iterations of both solves, or of the unrolled cell.
        width: channels.
        batch_size: examples a step.

    Raises:
        MemoryError: the process ran out of memory.
        RuntimeError: the process failed in another way.
    """
    found = added_peak(kind, take_steps, kind, depth, width, batch_size)
    if isinstance(found, MemoryError):
        raise found
    return found


def take_steps(kind: str, depth: int, width: int, batch_size: int) -> None:
    """In a process of its own: the steps."""
    if kind == "unrolled":
        arguments: dict = {"unrolled": depth}
    else:
        arguments = {"tolerance": SMALLEST_TOLERANCE, "max_iterations": depth, "unconverged": "ignore"}
        if kind == "fixed point, picard":
            arguments |= {"solver": "picard", "adjoint_solver": "picard"}
    random = np.random.default_rng(0)
    images = random.random((batch_size, 32, 32, 3), dtype="float32")
    labels = random.integers(10, size=batch_size)
    model = network.build((32, 32, 3), 10, width, **arguments)
    model.compile("sgd", "sparse_categorical_crossentropy")
    for _ in range(STEPS):
        model.train_on_batch(images, labels)
