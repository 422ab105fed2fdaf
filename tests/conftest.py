"""Every test has the same seed and no network, and float64 if it asks for it. Settings make compilation cheap."""

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_ENABLE_X64", "1")
# Tests compile much and compute little, so XLA optimizes little. On JAX its older code for fused loops compiles in
# little more than half the time, and a program in one part in three quarters of the time of several parts.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA ends a process that names a flag it does not know.
with contextlib.suppress(metadata.PackageNotFoundError):
    if metadata.version("jaxlib").startswith("0.10."):
        flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
with contextlib.suppress(metadata.PackageNotFoundError):
    if metadata.version("tensorflow-cpu").startswith("2.21."):
        flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_parallel_codegen_split_count=1 {os.environ.get('XLA_FLAGS', '')}"
# Threads of XLA on JAX. Decompositions that wait for others in the pool, each on one of its threads, wait forever if
# there are as many of them as threads.
os.environ.setdefault("NPROC", "8")
os.environ.setdefault("WANDB_MODE", "offline")
# pytest-xdist runs one process for each core, so further threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
# Most of JAX' programs are the same from test to test, so the processes share a cache of compiled programs.
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


MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="session")
def one_context_of_mlir():
    """One context for all programs. JAX makes one for each, which takes as long as loading a small program does."""
    with contextlib.suppress(ImportError):
        from jax._src.interpreters import mlir

        if hasattr(mlir, "make_ir_context"):
            mlir.make_ir_context = functools.cache(mlir.make_ir_context)


@pytest.fixture(autouse=True)
def few_compiled_programs():
    """JAX' programs are dropped in time. Each holds memory maps; a process with more than 65,530 crashes on Linux."""
    yield
    if keras.backend.backend() == "jax" and MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
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
    # Fewer where each graph takes long: TensorFlow traces each one anew, and JAX compiles every operation of each.
    default = {"tensorflow": 100, "jax": 20}.get(keras.backend.backend(), 200)
    parser.addoption(
        "--fuzz-interface", type=int, default=400, help="how many calls tests/test_fuzz_interface.py makes"
    )
    parser.addoption("--fuzz-interface-seed", type=int, default=0, help="and which")
    parser.addoption("--fuzz", type=int, default=default, help="how many random graphs tests/test_fuzz.py checks")
    calls = {"tensorflow": 20, "jax": 4}.get(keras.backend.backend(), 40)
    parser.addoption("--fuzz-calls", type=int, default=calls, help="how many programs tests/test_fuzz_calls.py checks")
    # None on JAX: each process compiles anew, which takes two minutes, and files are written alike on all backends.
    kills = 0 if keras.backend.backend() == "jax" else 3
    parser.addoption("--kills", type=int, default=kills, help="how many runs tests/experiments/test_kills.py kills")
    parser.addoption("--studies", action="store_true", help="test the studies whatever the backend")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "every_backend: of a study, about the backend: see tests/experiments/conftest.py"
    )
