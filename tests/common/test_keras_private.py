"""One module alone touches Keras' private parts, and a name that a version of Keras lacks is told in one line."""

import ast
import functools
import importlib
import inspect
import pkgutil
import runpy
from pathlib import Path
from types import SimpleNamespace

import keras
import pytest
from compare import normal
from keras import layers

import experiments
import jvpreg
from jvpreg.common import keras_private
from jvpreg.common.keras_private import ATTRIBUTES, NAMES, TESTED, MissingKerasNameError

ROOT = Path(__file__).parents[2]
DOOR = Path(keras_private.__file__)
OURS = ("jvpreg", "experiments")
FILES = [path for folder in OURS for path in (ROOT / folder).rglob("*.py") if path != DOOR]
LAST = {name.rpartition(".")[2] for name in (*NAMES, *ATTRIBUTES)}
PRIVATE = {name for name in LAST if name.startswith("_")}


def take_away(monkeypatch, name):
    path, _, attribute = name.rpartition(".")
    owner = functools.reduce(getattr, path.split(".")[1:], keras)
    for holder in getattr(owner, "__mro__", [owner]):
        if attribute in vars(holder):
            monkeypatch.delattr(holder, attribute)


def check_told(error, name, purpose):
    """The error is one sentence and then the remedy; no other error is shown before it."""
    first, then = str(error).split(". Install ")
    assert first == f"Keras {keras.__version__} lacks `{name}`, which jvpreg needs to {purpose}"
    assert then == f"Keras {TESTED}, or a newer jvpreg."
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__


# A version of Keras that lacks a name.


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_name_is_told_at_import(monkeypatch, name):
    take_away(monkeypatch, name)
    with pytest.raises(ImportError) as caught:
        runpy.run_path(str(DOOR))
    check_told(caught.value, name, NAMES[name].purpose)


def test_each_missing_name_has_a_line(monkeypatch):
    names = ["keras.Layer._clear_losses", "keras.src.ops.node.KerasHistory"]
    for name in names:
        take_away(monkeypatch, name)
    with pytest.raises(ImportError) as caught:
        runpy.run_path(str(DOOR))
    assert [line.split("`")[1] for line in str(caught.value).splitlines()] == names


USES = {
    "keras.Function._inputs_struct": lambda: keras_private.input_structure(SimpleNamespace()),
    "keras.KerasTensor._keras_history": lambda: keras_private.function([keras.KerasTensor((3,))], []),
    "keras.Layer._convert_input_args": lambda: keras_private.casts_inputs(SimpleNamespace(autocast=True)),
    "keras.Layer._layers": lambda: keras_private.attributes(SimpleNamespace(named_children=list)),
    "keras.Layer._losses": lambda: keras_private.clear_own_losses(SimpleNamespace()),
    "keras.Operation._inbound_nodes": lambda: keras_private.last_call(SimpleNamespace()),
    "keras.Operation._outbound_nodes": lambda: keras_private.recorded_calls(SimpleNamespace(_inbound_nodes=[])),
    "keras.layers.Dense._kernel": lambda: keras_private.kernel(SimpleNamespace()),
    "keras.src.ops.node.Node.arguments": lambda: keras_private.last_call(SimpleNamespace(_inbound_nodes=[0])),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_missing_attribute_is_told_at_its_first_use(monkeypatch, name):
    monkeypatch.setattr(keras, "Input", lambda *args, **kwargs: SimpleNamespace())
    keras_private._check_history.cache_clear()
    with pytest.raises(MissingKerasNameError) as caught:
        USES[name]()
    check_told(caught.value, name, ATTRIBUTES[name].purpose)


def test_a_missing_operation_is_told(monkeypatch):
    take_away(monkeypatch, "keras.src.ops.nn.Conv")
    door = runpy.run_path(str(DOOR))
    assert door["nn"].Relu is keras_private.nn.Relu
    with pytest.raises(ImportError) as caught:
        door["nn"].Conv  # noqa: B018
    check_told(caught.value, "keras.src.ops.nn.Conv", NAMES["keras.src.ops.nn"].purpose)


class Own(layers.Layer):
    """A layer with a call of its own, which is opened up."""

    def call(self, x):
        return keras.ops.tanh(x)


def test_a_layer_is_not_left_to_autodiff_for_a_missing_name(monkeypatch):
    def last_call(operation):
        raise MissingKerasNameError("keras.Operation._inbound_nodes")

    layer, x = Own(), normal(2, 3)
    layer(x)
    monkeypatch.setattr(keras_private, "last_call", last_call)
    with pytest.raises(MissingKerasNameError, match="_inbound_nodes"):
        jvpreg.linearize(layer, x)


def test_the_version_that_errors_name_is_the_one_that_is_tested():
    assert (ROOT / "pyproject.toml").read_text(encoding="utf-8").count(f'"keras~={TESTED}.0"') == 3


# Nothing else touches Keras' private parts.


def is_private(name) -> bool:
    return name.startswith("_") and not name.startswith("__")


@functools.cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def defined(tree):
    """The underscore names that a module, its classes and their methods define."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            if isinstance(node, ast.Name):
                yield node.id
            elif ast.unparse(node.value) == "self":
                yield node.attr


def touched(tree):
    """Each underscore name that a module takes from another object or has in a string, and each `keras.src`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls", "super()"):
            if is_private(node.attr):
                yield node.lineno, node.attr
            elif ast.unparse(node) == "keras.src":
                yield node.lineno, "keras.src"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value in PRIVATE or node.value.startswith("keras.src"):
                yield node.lineno, node.value
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("delattr", "getattr", "hasattr", "setattr"):
            named = [given.value for given in node.args[1:2] if isinstance(given, ast.Constant)]
            yield from ((node.lineno, name) for name in named if is_private(name))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            yield from ((node.lineno, name) for name in modules if name.startswith("keras.src"))


@functools.cache
def own_names():
    of_python = {"_asdict", "_exit", "_fields", "_replace"}
    return {name for path in FILES for name in defined(parsed(path)) if is_private(name)} - PRIVATE | of_python


def strangers(tree, path="") -> list[str]:
    """The private names that a module touches and that are not the project's own."""
    return [f"{path}:{line}: {name}" for line, name in touched(tree) if name not in own_names()]


@pytest.mark.parametrize(
    "line",
    [
        "from keras.src.ops import nn",
        "import keras.src.backend",
        "keras.src.ops.nn.Conv",
        "layer._kernel",
        "layer._not_ours",
        "getattr(layer, '_layers', None)",
        "hasattr(layer, '_not_ours')",
        "vars(layer)['_layers']",
        "importlib.import_module('keras.src.ops')",
    ],
)
def test_a_new_use_is_found(line):
    assert strangers(ast.parse(line))


def test_private_names_are_touched_in_one_place():
    assert len(FILES) > 150
    assert not [found for path in FILES for found in strangers(parsed(path), path.relative_to(ROOT))]


def test_the_list_of_private_names_is_that_of_those_in_use():
    body = parsed(DOOR).body
    tables = [node for node in body if isinstance(node, ast.Assign) and "Use(" in ast.unparse(node)]
    tree = ast.Module([node for node in body if node not in tables], [])
    ours = {name for name in defined(tree) if is_private(name) and name not in PRIVATE}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert len(tables) == 2
    assert {name for name in attributes if is_private(name)} <= PRIVATE | ours
    assert {name for name in strings if name.startswith("keras.src.")} <= {*NAMES, *ATTRIBUTES}
    assert not [n for n in (*NAMES, *ATTRIBUTES) if n not in strings and n.rpartition(".")[2] not in attributes]


@functools.cache
def names_in(kind) -> set[str]:
    """The underscore names of a class: those of its methods, and those that they use of `self`."""
    nodes = ast.walk(ast.parse(inspect.cleandoc("\n" + inspect.getsource(kind))))
    used = [node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"]
    return {name for name in (*vars(kind), *used) if is_private(name)}


def test_no_class_of_ours_shares_a_private_name_with_a_class_of_keras():
    found = [
        importlib.import_module(module.name)
        for package in (jvpreg, experiments)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if ".hub_" not in module.name  # of keras-hub, which is no part of the tests' environment
    ]
    kinds = {id(kind): kind for module in found if module is not keras_private for kind in vars(module).values()}
    ours = [kind for kind in kinds.values() if inspect.isclass(kind) and kind.__module__.split(".")[0] in OURS]
    pairs = [(kind, base) for kind in ours for base in kind.__mro__ if base.__module__.startswith("keras.")]
    assert len(pairs) > 40
    assert not [(kind, base, shared) for kind, base in pairs if (shared := names_in(kind) & names_in(base))]
