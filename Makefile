# Two commands do everything: `make quickstart` and `make test`. Both need Python 3.11 and make, no more.
PYTHON ?= python3
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

.PHONY: quickstart test docs test-tensorflow test-jax test-torch lint clean

# Train plain and regularized on embedded digits, offline, and print the comparison and where the plot is.
quickstart: .venv-tensorflow/installed
	KERAS_BACKEND=tensorflow WANDB_MODE=offline .venv-tensorflow/bin/python -m experiments compare --config configs/quickstart.yaml

# What must pass before a change lands: lint, types, import contract, and the tests on the TensorFlow backend.
test: lint test-tensorflow

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
test-tensorflow test-jax test-torch: test-%: .venv-%/installed
	KERAS_BACKEND=$* .venv-$*/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests jvpreg

# An environment for each backend, without the others: nothing may import what its users do not have. Not compiled to
# bytecode beforehand, which takes half a minute and is mostly of modules that nothing imports.
.venv-%/installed: pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade pip
	.venv-$*/bin/python -m pip install --quiet --no-compile --group $* --group test --editable .[experiments]
	touch $@

clean:
	rm -rf .venv-* runs site
