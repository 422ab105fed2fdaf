"""The studies' own tests run on one backend, but for those that are about the backend and marked `every_backend`.

With `--studies` all of them run.
"""

import keras

# These train many small models, which takes a fraction of the time on Torch, where nothing is traced. The other tests
# run on TensorFlow: the commands of the quickstart, and benchmarks, of whose competitors Torch lacks some.
ON_TORCH = {
    "test_constraints_study.py",
    "test_distill_study.py",
    "test_fixed_point_study.py",
    "test_gan_study.py",
    "test_health.py",
    "test_regularization_study.py",
    "test_saliency_study.py",
    "test_sparing_study.py",
    "test_text_study.py",
    "test_verify_zoos.py",
}


def pytest_collection_modifyitems(config, items):
    if config.getoption("--studies"):
        return
    backend = keras.backend.backend()
    elsewhere = [
        item
        for item in items
        if "experiments" in item.path.parts
        and "every_backend" not in item.keywords
        and backend != ("torch" if item.path.name in ON_TORCH else "tensorflow")
    ]
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = [item for item in items if item not in elsewhere]
