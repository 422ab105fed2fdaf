"""The rooms of the package: names of modules are not hidden, files and functions are short."""

import ast
import importlib
import importlib.resources
import inspect
import pkgutil
import re
import tomllib
import types
from pathlib import Path

import keras
import pytest

import jvpreg

PACKAGE = Path(jvpreg.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
LINES, LINES_OF_A_FUNCTION = 400, 60
AT_THE_ROOT = {"__init__", "clone", "linearization", "probes", "products", "tangent_model"}


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="AutoGraph is TensorFlow's")
def test_autograph_can_convert_what_runs_in_a_function_of_tensorflow():
    """Otherwise each user of `tf.function` is warned: of a walrus within an `and`, of a type of what is closed over."""
    import tensorflow as tf

    failed, converted = [], 0
    for name in names_of_modules():
        if name.split(".")[0] in ("callbacks", "testing", "training"):
            continue  # Keras calls them, and without AutoGraph.
        module = importlib.import_module(f"jvpreg.{name}")
        classes = [value for value in vars(module).values() if inspect.isclass(value)]
        for owner in (module, *(value for value in classes if value.__module__ == module.__name__)):
            for function in filter(inspect.isfunction, map(inspect.unwrap, filter(callable, vars(owner).values()))):
                # What has no source was made by `dataclass`; generators are left as they are, without a warning.
                own = function.__module__ == module.__name__ and function.__code__.co_filename == module.__file__
                if not own or inspect.isgeneratorfunction(function):
                    continue
                if not re.search(r":=|^\s+\w+: .* = ", inspect.getsource(function), re.MULTILINE):
                    continue
                converted += 1
                try:
                    tf.autograph.to_code(function)
                except Exception as error:
                    failed.append(f"{module.__name__}.{function.__qualname__}: {error}")
    assert converted > 20
    assert not failed


def names_of_modules():
    return [module.name.removeprefix("jvpreg.") for module in pkgutil.walk_packages([str(PACKAGE)], "jvpreg.")]


@pytest.mark.parametrize("name", [module.name for module in pkgutil.walk_packages([str(PACKAGE)], "jvpreg.")])
def test_a_module_is_not_hidden_by_what_its_package_exports(name):
    parent, _, own = name.rpartition(".")
    importlib.import_module(name)
    assert isinstance(getattr(importlib.import_module(parent), own), types.ModuleType)


def test_type_checkers_are_told_of_the_types():
    marker = importlib.resources.files("jvpreg") / "py.typed"
    assert marker.is_file()
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    assert marker.name in settings["tool"]["setuptools"]["package-data"]["jvpreg"]  # so that it is installed


def test_few_modules_are_at_the_root():
    assert {path.stem for path in PACKAGE.glob("*.py")} == AT_THE_ROOT


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_and_functions_are_short(path):
    text = path.read_text()
    lines = text.count("\n")
    assert lines <= LINES, f"{path} has {lines} lines, {LINES} at most: split it by what is in it"
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    assert not [node.name for node in functions if node.end_lineno - node.lineno >= LINES_OF_A_FUNCTION]
