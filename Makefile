PYTHON ?= python3
TEST_WORKERS ?= 2
# Further arguments, for example: make demo ARGS="--batch-size 8", make test ARGS="-k plan"
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
N ?= 2000
QUICK := tests/ir tests/plan tests/analysis

.PHONY: help demo check test test-all durations compatibility test-versions fuzz lint format clean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo: $(STAMP) ## compare radix with inductor on a batch of few-shot prompts
	$(BIN)/python -m benchmarks.demo $(ARGS)

check: lint ## lint, and the tests that compile no model: two minutes, for before a commit
	$(BIN)/python -m pytest -q -n $(TEST_WORKERS) $(QUICK) $(ARGS)

test: $(STAMP) ## run the tests, but those marked slow
	$(BIN)/python -m pytest -n $(TEST_WORKERS) $(ARGS)

test-all: $(STAMP) ## run all tests, and check graphs after every pass in all of them
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --everything $(ARGS)

durations: $(STAMP) ## run the default tests, and write the seconds that they take to tests/durations.json
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --record-durations tests/durations.json $(ARGS)

compatibility: $(STAMP) ## run every family and form, and write docs/compatibility.md (half an hour)
	$(BIN)/python -m tests.compatibility docs/compatibility.md --workers $(TEST_WORKERS) $(ARGS)

test-versions: $(STAMP) ## run the end-to-end tests with other versions of torch and transformers (an hour)
	$(BIN)/python -m tests.compatibility.versions --workers $(TEST_WORKERS) $(ARGS)

fuzz: $(STAMP) ## compare N random programs folded and plain: make fuzz N=20000
	$(BIN)/python -W ignore -m tests.fuzz --count $(N) $(ARGS)

lint: $(STAMP) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment, caches and build output
	rm -rf $(VENV) .versions build dist extension/build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -type d \( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} +

# torch comes first and pinned: asking for it without the version may fetch a different build.
# The extension comes last and may fail, as it does where there is no C compiler.
$(STAMP): pyproject.toml constraints.txt extension/pyproject.toml extension/setup.py extension/radix_compile_native.c
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch==2.13.0
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) ./extension || echo 'radix-compile-native is not installed: NumPy does its work'
	@touch $@
