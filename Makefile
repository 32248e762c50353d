# `make` alone lists the targets. PYTHON picks the interpreter that makes .venv, JOBS the test processes.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
STAMP := .venv/.setup-done
PEERS := $(patsubst bench/peers/%.txt,.venv/peers/%/.setup-done,$(wildcard bench/peers/*.txt))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-slow check bench peers-env vllm-env docs clean

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with the pinned packages and fetch the demo model
	@$(BIN)/python -m compress.checkpoint.demo

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed, {sys.executable} is {v[0]}.{v[1]}; name another: make setup PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: setup ## compress SmolLM2-135M: prune, distil, quantize, check; result in out/demo
	$(BIN)/autoglm-compress run recipes/demo.yaml --overwrite

test: setup ## all tests but the slow ones
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-slow: setup ## the slow tests: the demo model end to end
	$(BIN)/python -m pytest -m slow

check: setup ## lint, format, types and the fast tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests/unit tests/recipes

bench: setup ## the measurements of docs/benchmarks.md, one script after another (long)
	@set -e; for script in bench/[a-z]*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

peers-env: $(PEERS) ## environments of the tools that bench/peers_quant.py compares with; -k: go on where one fails

.venv/peers/%/.setup-done: bench/peers/%.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check --quiet -r $<
	@touch $@

vllm-env: .venv/vllm/.setup-done ## environment of vLLM, in which a slow test loads layers that differ

.venv/vllm/.setup-done: tests/vllm.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check --quiet -r $<
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

docs: setup ## write from the code: tables of docs/recipes.md, docs/commands.md, recipes/schema.json, signatures
	$(BIN)/python -m tests.recipe_docs

clean: ## remove results, builds and caches; .venv and the demo model stay
	rm -rf out build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
