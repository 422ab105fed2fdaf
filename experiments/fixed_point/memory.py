"""The peak memory of training steps, in a process of its own: `… .memory KIND DEPTH WIDTH BATCH_SIZE`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
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
        RuntimeError: the process failed.
    """
    words = [sys.executable, "-m", "experiments.fixed_point.memory", kind, str(depth), str(width), str(batch_size)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"The process that measures the memory of {kind!r} failed: {last}")
    return int(done.stdout.split()[-1])


def main(kind: str, depth: str, width: str, batch_size: str) -> None:
    """Take the steps, and print what they added to the peak."""
    import numpy as np

    from experiments.benchmark.memory import resident_peak
    from experiments.fixed_point import network

    if kind == "unrolled":
        arguments: dict = {"unrolled": int(depth)}
    else:
        arguments = {"tolerance": SMALLEST_TOLERANCE, "max_iterations": int(depth), "unconverged": "ignore"}
        if kind == "fixed point, picard":
            arguments |= {"solver": "picard", "adjoint_solver": "picard"}
    random = np.random.default_rng(0)
    images = random.random((int(batch_size), 32, 32, 3), dtype="float32")
    labels = random.integers(10, size=int(batch_size))
    before = resident_peak()
    model = network.build((32, 32, 3), 10, int(width), **arguments)
    model.compile("sgd", "sparse_categorical_crossentropy")
    for _ in range(STEPS):
        model.train_on_batch(images, labels)
    print(resident_peak() - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
