"""A long `fit` with a probe: `python -m tests.long_run` tells what memory and traces do in 3,000 steps.

`tests/callbacks/test_long_run.py` runs a short one.
"""

import gc
import os

import keras
import numpy as np

import jvpreg

BATCH = 4
RANDOM = np.random.default_rng(0)


class Record(keras.callbacks.Callback):
    """Records after each measurement of a probe: traces so far, live objects, and MB of memory."""

    def __init__(self, traces: dict, every: int):
        super().__init__()
        self.traces, self.every = traces, every
        self.steps = 0
        self.rows: list[dict] = []

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        if self.steps % self.every == 0:
            gc.collect()
            self.rows.append(
                {
                    "step": self.steps,
                    "norm": logs["jacobian/norm"],
                    **self.traces,
                    "objects": len(gc.get_objects()),
                    "memory": resident_megabytes(),
                }
            )


def resident_megabytes() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(steps: int, every: int, epochs: int) -> list[dict]:
    """Trains for so many steps, with a measurement after every so many; a row for each of them."""
    traces = {"step traces": 0, "probe traces": 0, "compilations": 0}

    # If a function is compiled, Python runs it only in a trace, so this counts traces; on Torch it counts each run.
    def loss(y, predicted):
        traces["step traces"] += 1
        return keras.losses.mean_squared_error(y, predicted)

    def norm(linearization):
        traces["probe traces"] += 1
        return jvpreg.estimators.frobenius_norm(linearization)

    if keras.backend.backend() == "jax":
        import jax

        def compiled(event, seconds, **more):
            traces["compilations"] += event == "/jax/core/compile/backend_compile_duration"

        jax.monitoring.register_event_duration_secs_listener(compiled)

    base = keras.Sequential([keras.Input((3,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(2)])
    model = jvpreg.JacobianModel(base, seed=0)
    model.compile("sgd", loss, jacobian_regularizers=[jvpreg.regularizers.JacobianNorm(0.01)])
    examples = BATCH * steps // epochs
    x, y = RANDOM.normal(size=(examples, 3)), RANDOM.normal(size=(examples, 2))
    probe = jvpreg.callbacks.JacobianProbe(x[:BATCH], {"norm": norm}, every_batches=every)
    record = Record(traces, every)
    model.fit(x, y, batch_size=BATCH, epochs=epochs, verbose=0, callbacks=[probe, record])
    return record.rows


if __name__ == "__main__":
    rows = run(3000, 50, 10)
    for row in [*rows[:6], *rows[9::10]]:
        print(row)
