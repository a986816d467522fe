# Two commands for a fresh machine:  make run   (a real model answers)   and   make test   (the tests pass).
# `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?= smollm2-135m-instruct
PROMPT ?= What is the capital of France?
SOURCES := src tests bench

.PHONY: help run chat serve demo-train test test-all check format bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

run: $(VENV)/.base ## set up, fetch the model once, answer PROMPT="..."
	@$(BIN)/llmasos run "$(MODEL)" "$(PROMPT)"

chat: $(VENV)/.base ## talk to MODEL=...
	@$(BIN)/llmasos chat "$(MODEL)"

serve: $(VENV)/.base ## serve MODEL=... on http://127.0.0.1:8000/v1
	@$(BIN)/llmasos serve "$(MODEL)"

demo-train: NAME := units-$(shell date +%m%d-%H%M%S)
demo-train: $(VENV)/.base ## teach MODEL=... a way to answer: LoRA, 50 steps on a CPU; then ask the result
	@$(BIN)/llmasos train sft --model "$(MODEL)" --data docs/data/units.jsonl --name $(NAME) \
		--steps 50 --max-length 64 --batch-tokens 512 --lr 1e-3
	@$(BIN)/llmasos run $(NAME) "How many cm are 3 m?" --temperature 0

# Two processes of one thread each: a test waits for others more than it computes. A file's tests share what they load.
test: $(VENV)/.dev ## set up and run the tests (offline, a few minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-all: $(VENV)/.dev ## also the slow and network tests
	$(BIN)/python -m pytest -q -m "not gpu and not shared"

check: $(VENV)/.dev ## format, lint, types, sizes
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python bench/sizes.py

format: $(VENV)/.dev ## format and mend what ruff can
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(VENV)/.dev ## speed against peers, one JSON line each (builds llama.cpp once)
	$(BIN)/python bench/startup.py
	$(BIN)/python bench/perplexity.py
	$(BIN)/python bench/cpu_generate.py

clean: ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The build of torch that fits the machine: uv knows where the CPU and the CUDA builds live. Where those can't be
# reached, the package index's own build does.
$(VENV)/.base: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --upgrade pip uv
	@$(BIN)/python -c "import torch" 2>/dev/null \
		|| $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend=auto "torch>=2.11" 2>/dev/null \
		|| $(BIN)/python -m pip install --quiet "torch==2.13.0"
	@$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@
