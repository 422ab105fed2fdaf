"""What a step, a product or a measurement costs: `python -m experiments benchmark STUDY`."""

from typing import Any

from experiments.benchmark.config import (
    BiasesConfig,
    DistillConfig,
    IterateConfig,
    JvpConfig,
    LayersConfig,
    MemoryConfig,
    ProbeConfig,
    ProbesConfig,
    ScaleConfig,
    StepConfig,
    WeightsConfig,
)

__all__ = [
    "BiasesConfig",
    "DistillConfig",
    "IterateConfig",
    "JvpConfig",
    "LayersConfig",
    "MemoryConfig",
    "ProbeConfig",
    "ProbesConfig",
    "ScaleConfig",
    "StepConfig",
    "WeightsConfig",
    "biases",
    "distill",
    "iterate",
    "jvp",
    "layers",
    "measure_memory",
    "probe",
    "probes",
    "scale",
    "step",
    "weights",
]


def step(config: StepConfig) -> dict[str, Any]:
    """Measure a training step; the import waits for valid keys, because Keras takes seconds to load."""
    from experiments.benchmark.study import run

    return run(config)


def biases(config: BiasesConfig) -> dict[str, Any]:
    """Measure training steps with bias-Jacobian penalties; the import waits as in `step`."""
    from experiments.benchmark.biases_study import run

    return run(config)


def distill(config: DistillConfig) -> dict[str, Any]:
    """Measure training steps of a student with its teacher; the import waits as in `step`."""
    from experiments.benchmark.distill_study import run

    return run(config)


def weights(config: WeightsConfig) -> dict[str, Any]:
    """Measure products along weights; the import waits as in `step`."""
    from experiments.benchmark.weights_study import run

    return run(config)


def probe(config: ProbeConfig) -> dict[str, Any]:
    """Measure what the Jacobian's norms and singular values cost; the import waits as in `step`."""
    from experiments.benchmark.probe_study import run

    return run(config)


def jvp(config: JvpConfig) -> dict[str, Any]:
    """Measure one product on whole architectures; the import waits as in `step`."""
    from experiments.benchmark.jvp_study import run

    return run(config)


def layers(config: LayersConfig) -> dict[str, Any]:
    """Measure products layer by layer; the import waits as in `step`."""
    from experiments.benchmark.layers_study import run

    return run(config)


def probes(config: ProbesConfig) -> dict[str, Any]:
    """Measure several products at once; the import waits as in `step`."""
    from experiments.benchmark.counts_study import probes

    return probes(config)


def iterate(config: IterateConfig) -> dict[str, Any]:
    """Measure products one after the other; the import waits as in `step`."""
    from experiments.benchmark.counts_study import iterate

    return iterate(config)


def scale(config: ScaleConfig) -> dict[str, Any]:
    """Measure how the cost grows; the import waits as in `step`."""
    from experiments.benchmark.scale_study import run

    return run(config)


def measure_memory(config: MemoryConfig) -> dict[str, Any]:
    """Measure what a frozen model holds; the import waits as in `step`. `memory` is the module of processes."""
    from experiments.benchmark.memory_study import run

    return run(config)
