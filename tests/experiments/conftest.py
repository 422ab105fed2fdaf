"""The studies' own tests run on one backend: what is of a backend in them is marked `every_backend`."""

import keras
import pytest

BACKEND = "tensorflow"


def pytest_collection_modifyitems(config, items):
    if keras.backend.backend() == BACKEND or config.getoption("--studies"):
        return
    skip = pytest.mark.skip(reason=f"studies are tested on {BACKEND}, and elsewhere with --studies")
    for item in items:
        if "experiments" in item.path.parts and "every_backend" not in item.keywords:
            item.add_marker(skip)
