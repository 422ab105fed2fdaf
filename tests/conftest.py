"""Float64 where a test asks for it, the same seed for every test, no network."""

import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # Tests compile much and compute little.
os.environ.setdefault("WANDB_MODE", "offline")

import keras
import pytest

import jvpreg


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def few_compiled_programs():
    """Each program that JAX keeps holds memory maps, of which Linux allows a process 65,530: beyond, it crashes."""
    yield
    maps = Path("/proc/self/maps")
    if keras.backend.backend() == "jax" and maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        import jax

        jax.clear_caches()


@pytest.fixture
def float64():
    with jvpreg.testing.float64():
        yield


@pytest.fixture(autouse=True)
def own_rules(monkeypatch):
    """A rule that a test registers is gone after it."""
    monkeypatch.setattr(jvpreg.registry, "_RULES", dict(jvpreg.registry._RULES))


def pytest_addoption(parser):
    # JAX compiles every operation of every graph.
    default = 40 if keras.backend.backend() == "jax" else 200
    parser.addoption("--fuzz", type=int, default=default, help="how many random graphs tests/test_fuzz.py checks")
