"""What the package says of itself agrees: its bounds, what the lowest of them are tested with, and its version."""

import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

import jvpreg

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BOUNDS = defaultdict(set)
for line in sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"]):
    name, bound = re.match(r"([\w.-]+)(?:\[\w+\])?(.*)", line).groups()
    BOUNDS[name].add(bound)


@pytest.mark.parametrize("package", BOUNDS)
def test_a_package_has_one_bound(package):
    assert len(BOUNDS[package]) == 1


def test_the_lowest_versions_are_those_of_the_short_suite():
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    lowest = dict(line.split("==") for line in lines if not line.startswith("#"))
    lowest["tensorflow"] = lowest.pop("tensorflow-cpu")
    assert lowest.pop("jaxlib") == lowest["jax"]
    for package, version in lowest.items():
        (bound,) = BOUNDS[package]
        assert f"{version}.".startswith(f"{bound.removeprefix('>=')}.")
    assert set(lowest) == {"jax", "keras", "numpy", "scipy", "tensorflow", "torch"}


def test_the_version_is_in_one_place():
    assert "version" in PROJECT["dynamic"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changes, re.MULTILINE)[1] == jvpreg.__version__


def imported(backend: str, without: list[str]) -> str:
    """What Python writes when jvpreg is imported on a backend while these packages are not installed."""
    program = f"import sys; sys.modules.update(dict.fromkeys({without})); import jvpreg"
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env={"KERAS_BACKEND": backend}
    ).stderr.splitlines()[-1]


@pytest.mark.parametrize("backend", ["", "tensorflow"])
def test_a_backend_that_is_not_installed_is_told(backend):
    assert imported(backend, ["tensorflow", "jax", "torch"]) == (
        "ImportError: Keras' backend is tensorflow, which is not installed. Install with "
        "`pip install jvpreg[tensorflow]`, or set the environment variable `KERAS_BACKEND` to jax or torch, once that "
        "is installed."
    )


def test_a_backend_that_jvpreg_does_not_run_on_is_told():
    assert imported("numpy", []) == (
        "ImportError: Invalid value for the environment variable `KERAS_BACKEND`. Expected tensorflow, jax or torch, "
        "on which jvpreg runs. Received: numpy"
    )
