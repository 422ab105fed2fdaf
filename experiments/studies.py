"""The list of what the command line runs. Nothing here imports Keras, which takes seconds to load: keys come first."""

import pkgutil
from typing import Any, NamedTuple

from experiments.benchmark import config as benchmark
from experiments.config import CompareConfig, TrainConfig
from experiments.constraints.config import ConstraintsConfig
from experiments.distill.config import DistillConfig
from experiments.estimators.config import EstimatorsConfig
from experiments.fixed_point.config import FixedPointConfig
from experiments.gan.config import GanConfig
from experiments.health.config import HealthConfig
from experiments.regularization.config import RegularizationConfig
from experiments.saliency.config import SaliencyConfig
from experiments.sparing.config import SparingConfig
from experiments.status import StatusConfig
from experiments.text.config import TextConfig
from experiments.verify.config import VerifyConfig


class Command(NamedTuple):
    """A subcommand of the command line.

    Attributes:
        config: the dataclass that types its keys; its docstring is the help.
        target: `MODULE:FUNCTION`, which is imported when it is called with an instance of `config`.
        goes_on: how to continue it after it was stopped: the words to add to the command, "" for none; None if it can
            only begin again.
    """

    config: type
    target: str
    goes_on: str | None = None

    def run(self, config: Any) -> object:
        """Import the function, and call it."""
        return pkgutil.resolve_name(self.target)(config)


STUDIES = {
    "train": Command(TrainConfig, "experiments.train:train", "--resume=auto"),
    "compare": Command(CompareConfig, "experiments.compare:compare", ""),
    "status": Command(StatusConfig, "experiments.status:status"),
    "verify": Command(VerifyConfig, "experiments.verify.study:run", "--resume=true"),
    "estimators": Command(EstimatorsConfig, "experiments.estimators.study:STUDY.run"),
    "fixed_point": Command(FixedPointConfig, "experiments.fixed_point.study:STUDY.run"),
    "health": Command(HealthConfig, "experiments.health.study:STUDY.run"),
    "constraints": Command(ConstraintsConfig, "experiments.constraints.study:run"),
    "regularization": Command(RegularizationConfig, "experiments.regularization.study:STUDY.run", ""),
    "distill": Command(DistillConfig, "experiments.distill.study:STUDY.run", ""),
    "saliency": Command(SaliencyConfig, "experiments.saliency.study:STUDY.run"),
    "gan": Command(GanConfig, "experiments.gan.study:STUDY.run", ""),
    "sparing": Command(SparingConfig, "experiments.sparing.study:STUDY.run", ""),
    "text": Command(TextConfig, "experiments.text.study:STUDY.run", ""),
}

BENCHMARKS = {
    "step": Command(benchmark.StepConfig, "experiments.benchmark.step_study:STUDY.run"),
    "biases": Command(benchmark.BiasesConfig, "experiments.benchmark.biases_study:STUDY.run"),
    "distill": Command(benchmark.DistillConfig, "experiments.benchmark.distill_study:STUDY.run"),
    "weights": Command(benchmark.WeightsConfig, "experiments.benchmark.weights_study:STUDY.run"),
    "probe": Command(benchmark.ProbeConfig, "experiments.benchmark.probe_study:STUDY.run"),
    "jvp": Command(benchmark.JvpConfig, "experiments.benchmark.jvp_study:STUDY.run", ""),
    "probes": Command(benchmark.ProbesConfig, "experiments.benchmark.counts_study:PROBES.run"),
    "iterate": Command(benchmark.IterateConfig, "experiments.benchmark.counts_study:ITERATE.run"),
    "layers": Command(benchmark.LayersConfig, "experiments.benchmark.layers_study:STUDY.run"),
    "memory": Command(benchmark.MemoryConfig, "experiments.benchmark.memory_study:STUDY.run"),
    "scale": Command(benchmark.ScaleConfig, "experiments.benchmark.scale_study:STUDY.run"),
}
"""What follows the word `benchmark`."""
