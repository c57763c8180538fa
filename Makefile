# make demo    train a small GPT-2 on this machine, some minutes on 2 CPU cores
# make test    run the tests
# make lint    check style and types
# make bench   measure training, fine-tuning and data beside what else there is: 20 minutes on 2 CPU cores
# make bench-gpu   measure on a CUDA GPU, into one file under benchmarks/results/: less than 20 minutes
# make docs    bring docs/ up to date with the code: its line numbers, and the reference of all keys
# make chaos   kill runs 200 times, damage files, fill disks, send signals, change ranks; compare what comes out:
#              a quarter of an hour on 2 CPU cores
# make install only set up .venv, which the others do as well

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/pretrain_quickstart

# make bench NANOGPT=~/nanoGPT BUILD_NANOGPT=~/build-nanogpt: beside these checkouts as well
NANOGPT_FLAG := $(if $(NANOGPT),--nanogpt $(NANOGPT))
PEERS := $(NANOGPT_FLAG) $(if $(BUILD_NANOGPT),--build-nanogpt $(BUILD_NANOGPT))

.PHONY: install demo test lint docs bench bench-gpu chaos
.DEFAULT_GOAL := demo

install: $(BIN)/.installed

$(BIN)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "llmkit needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	rm -rf $(DEMO)
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml recipes/pretrain.py --output_dir $(DEMO)

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --durations 10

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

docs: install
	$(BIN)/python docs/build.py

bench: install
	$(BIN)/python benchmarks/training_step.py $(PEERS)
	$(BIN)/python benchmarks/training_step.py --bf16 $(PEERS)
	$(BIN)/python benchmarks/trainer_overhead.py
	$(BIN)/python benchmarks/sft.py
	$(BIN)/python benchmarks/data.py --rounds 2
	$(BIN)/python benchmarks/startup.py --rounds 2
	$(BIN)/python benchmarks/scaling.py --rounds 2
	$(BIN)/python benchmarks/generation.py --rounds 2 $(NANOGPT_FLAG)

bench-gpu: install
	$(BIN)/python benchmarks/gpu.py

chaos: install
	$(BIN)/python tests/chaos/chaos.py --kills 200
	$(BIN)/python tests/chaos/damage.py
	$(BIN)/python tests/chaos/signals.py
	$(BIN)/python tests/chaos/elastic.py
