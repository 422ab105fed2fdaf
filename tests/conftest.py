"""Float64 where a test asks for it, the same seed for every test, no network; compiled and computed cheaply."""

import atexit
import contextlib
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_ENABLE_X64", "1")
# Tests compile much and compute little. XLA's older code for fused loops compiles in little more than half the time.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
with contextlib.suppress(metadata.PackageNotFoundError):
    if metadata.version("jaxlib").startswith("0.10."):  # XLA ends a process that names a flag it does not know.
        os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("WANDB_MODE", "offline")
# There is a process of pytest-xdist for each core: further threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
# Most of JAX' programs are the same from test to test: what one process has compiled, all of them load.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

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
    monkeypatch.setattr(jvpreg.rules.registry, "_RULES", dict(jvpreg.rules.registry._RULES))


def pytest_addoption(parser):
    # TensorFlow traces a graph for each anew, and JAX compiles every operation of every graph.
    default = {"tensorflow": 100, "jax": 20}.get(keras.backend.backend(), 200)
    parser.addoption(
        "--fuzz-interface", type=int, default=400, help="how many calls tests/test_fuzz_interface.py makes"
    )
    parser.addoption("--fuzz-interface-seed", type=int, default=0, help="and which")
    parser.addoption("--fuzz", type=int, default=default, help="how many random graphs tests/test_fuzz.py checks")
    calls = {"tensorflow": 20, "jax": 4}.get(keras.backend.backend(), 40)
    parser.addoption("--fuzz-calls", type=int, default=calls, help="how many programs tests/test_fuzz_calls.py checks")
    # On JAX each of the processes compiles anew: two minutes, for files that are written alike on all backends.
    kills = 0 if keras.backend.backend() == "jax" else 3
    parser.addoption("--kills", type=int, default=kills, help="how many runs tests/experiments/test_kills.py kills")
    parser.addoption("--studies", action="store_true", help="test the studies whatever the backend")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "every_backend: of a study, about the backend: see tests/experiments/conftest.py"
    )
