# Two commands do everything: `make quickstart` and `make test`. Both need Python 3.11 and make, no more.
PYTHON ?= python3
LOWEST_PYTHON ?= python3.11
NEWEST_PYTHON ?= python3.13
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

.PHONY: quickstart test test-quick test-slow test-tensorflow test-jax test-torch test-lowest test-newest test-peers
.PHONY: docs dist lint clean

# Train plain and regularized on embedded digits, offline, and print the comparison and where the plot is.
quickstart: .venv-tensorflow/installed
	KERAS_BACKEND=tensorflow WANDB_MODE=offline .venv-tensorflow/bin/python -m experiments compare --config configs/quickstart.yaml

# What to run before a change is sent: lint, types, import contracts, and the quick tests on the TensorFlow backend, in
# about 8 minutes. `.ci/run` runs the others too, and all tests on the other two backends.
test: lint test-quick

# The documentation site, into site/; a warning is an error. Nothing is fetched but the environment, once.
docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build

# No package that it documents: pages are made from the source.
.venv-docs/installed: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --upgrade pip
	.venv-docs/bin/python -m pip install --quiet --group docs
	touch $@

lint: .venv-tensorflow/installed
	.venv-tensorflow/bin/ruff check .
	.venv-tensorflow/bin/ruff format --check .
	.venv-tensorflow/bin/mypy
	.venv-tensorflow/bin/lint-imports

# Files in their order: those with the most tests first would put the longest, which have few, to the end.
PYTEST = -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-quick test-slow: test-%: .venv-tensorflow/installed
	KERAS_BACKEND=tensorflow .venv-tensorflow/bin/python $(PYTEST) -m "$(if $(filter quick,$*),not )slow" tests jvpreg

test-tensorflow test-jax test-torch: test-%: .venv-%/installed
	KERAS_BACKEND=$* .venv-$*/bin/python $(PYTEST) tests jvpreg

# An environment for each backend, without the others: nothing may import what its users do not have. Not compiled to
# bytecode beforehand, which takes half a minute and is mostly of modules that nothing imports.
.venv-%/installed: pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade pip
	.venv-$*/bin/python -m pip install --quiet --no-compile --group $* --group test --editable .[experiments]
	touch $@

# The lowest versions that pyproject.toml allows, and the newest that there are: a short suite of rules, graph, model
# and callbacks. One backend alone: `make test-lowest-jax`.
SHORT := tests/rules/test_registry.py tests/rules/test_rules_ends.py tests/engine/test_tracer.py \
	tests/engine/test_opening.py tests/test_linearization.py tests/training/test_steps.py \
	tests/training/test_model_saving.py tests/callbacks/test_history.py tests/callbacks/test_probe.py
# Torch 2.6 and 2.7 roll by no tensor.
LEFT_OUT_lowest := tests/engine/test_opening.py::test_a_tensor_in_place_of_a_constant_is_left_to_autodiff[roll]
BACKENDS := tensorflow jax torch
PACKAGE_tensorflow := tensorflow-cpu

test-lowest: $(BACKENDS:%=test-lowest-%)
test-newest: $(BACKENDS:%=test-newest-%)

$(foreach end,lowest newest,$(BACKENDS:%=test-$(end)-%)): test-%: .venv-%/installed
	KERAS_BACKEND=$(lastword $(subst -, ,$*)) .venv-$*/bin/python -m pytest -n 2 --dist loadfile $(SHORT) \
		$(patsubst %,--deselect '%',$(LEFT_OUT_$(firstword $(subst -, ,$*))))

.venv-lowest-%/installed: pyproject.toml constraints-lowest.txt
	$(LOWEST_PYTHON) -m venv .venv-lowest-$*
	.venv-lowest-$*/bin/python -m pip install --quiet --upgrade pip
	.venv-lowest-$*/bin/python -m pip install --quiet --no-compile --constraint constraints-lowest.txt \
		--group short --editable . $(or $(PACKAGE_$*),$*)
	touch $@

.venv-newest-%/installed: pyproject.toml
	$(NEWEST_PYTHON) -m venv .venv-newest-$*
	.venv-newest-$*/bin/python -m pip install --quiet --upgrade pip
	.venv-newest-$*/bin/python -m pip install --quiet --no-compile --group short --editable . $(or $(PACKAGE_$*),$*)
	touch $@

# Results against those of packages by others, which are in environments of their own.
test-peers: test-peers-jax test-peers-torch

test-peers-jax test-peers-torch: test-%: .venv-%/installed
	KERAS_BACKEND=$(lastword $(subst -, ,$*)) .venv-$*/bin/python -m pytest tests/peers

.venv-peers-%/installed: pyproject.toml
	$(PYTHON) -m venv .venv-peers-$*
	.venv-peers-$*/bin/python -m pip install --quiet --upgrade pip
	.venv-peers-$*/bin/python -m pip install --quiet --no-compile --group $* --group peers-$* --editable .[experiments]
	touch $@

# A wheel and an sdist, in dist/, checked.
dist: .venv-dist/installed
	rm -rf build dist
	.venv-dist/bin/python -m build --quiet
	.venv-dist/bin/twine check --strict dist/*

.venv-dist/installed:
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet build twine
	touch $@

clean:
	rm -rf .venv-* runs build dist site
