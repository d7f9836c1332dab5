VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PLAN ?= fastv(layer=2,keep=0.25)
QUESTION ?= Describe the image.
PACKAGES := mmefficient models kernels demo

.DEFAULT_GOAL := help
.PHONY: help run test lint types clean

help:  ## show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

run: $(VENV)/.package  ## answer a question about the bundled picture, without a plan and with one
	$(BIN)/mmefficient ask sample "$(QUESTION)" --plan "$(PLAN)" --compare

test: $(VENV)/.test  ## run the test suite
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.dev  ## ruff: style and formatting mistakes
	$(BIN)/ruff check .

types: $(VENV)/.dev  ## mypy, on the tree as it is installed
	@rm -rf build/types && mkdir -p build/types/mmefficient
	@ln -s $(CURDIR)/mmefficient/* $(CURDIR)/models $(CURDIR)/kernels $(CURDIR)/demo build/types/mmefficient/
	cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir /dev/null -p mmefficient

clean:  ## remove everything that was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(PACKAGES) tests -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.package: pyproject.toml setup.py | $(BIN)/python
	$(BIN)/pip install --editable .
	@touch $@

$(VENV)/.test $(VENV)/.dev: $(VENV)/.%: pyproject.toml setup.py | $(BIN)/python
	$(BIN)/pip install --editable ".[$*]"
	@touch $@
