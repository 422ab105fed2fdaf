"""A model of a zoo, and how it is found by name."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from experiments.errors import ExperimentError

MODULES = {
    "keras_hub": ("hub_text", "hub_images"),
    "tutorials": ("tutorial_images", "tutorial_sequences", "tutorial_fields", "tutorial_sets"),
}
"""The modules of each zoo, each with a list `MEMBERS`."""


@dataclass(frozen=True)
class Member:
    """One model to verify.

    Attributes:
        name: in the table, and of the key `only`.
        make: returns the model, in the dtype that Keras is set to.
        inputs: from a generator and a number of examples to random inputs, floats in float32 at most.
        at: the path of the layer by whose output it is differentiated, where all inputs are whole numbers.
    """

    name: str
    make: Callable[[], keras.Model]
    inputs: Callable[[np.random.Generator, int], Any]
    at: str | None = None

    def built(self, x: Any) -> keras.Model:
        """The model, which has its weights once it has seen an input."""
        model = self.make()
        model(x)
        return model


def members(zoo: str) -> list[Member]:
    """The models of a zoo, in the order of the table.

    Raises:
        ExperimentError: keras-hub is not installed.
    """
    try:
        modules = [importlib.import_module(f"experiments.verify.zoos.{name}") for name in MODULES[zoo]]
    except ModuleNotFoundError as error:
        if error.name != "keras_hub":
            raise
        raise ExperimentError(
            f"zoo: {zoo} needs keras-hub, which is not installed. Install it with `pip install 'jvpreg[zoo]'`."
        ) from error
    return [member for module in modules for member in module.MEMBERS]


def named(zoo: str, names: Sequence[str] | None) -> list[Member]:
    """The models of these names, in the order of the table; of None, all.

    Raises:
        ExperimentError: there is no model of a name, or keras-hub is not installed.
    """
    all_of_them = members(zoo)
    known = [member.name for member in all_of_them]
    for name in names or ():
        if name not in known:
            raise ExperimentError(f"only: {zoo} has no model {name!r}. Expected names among {', '.join(known)}.")
    return [member for member in all_of_them if names is None or member.name in names]
