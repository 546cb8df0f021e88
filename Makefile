# Two commands do everything from a fresh clone: `make demo` and `make test`. Each sets up .venv first, if needed.
#
# torch: the pinned version is installed first and by itself. Where the package index offers a CPU build, it is taken;
# to choose another build (CPU wheels on a machine without a GPU, a CUDA build on one with), give its index:
#     make demo TORCH_INDEX=https://...

# Threads that wait by spinning bring training to a standstill beside any busy neighbour (docs/log.md, 2026-11-20).
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 2000

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
TUNING := --labels 4 --steps 90 --crop.shape 48 48 32 --scoring.looks 2
TORCH_INDEX ?=
INDEX := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),)
.PHONY: demo test lint bench clean

demo: $(VENV)/ready
	rm -rf $(DEMO)
	$(BIN)/python -m spade3d.volumes.phantoms --kind heart-ct --patients 30 --unlabelled 10 --size 64 64 48 \
		--spacing 4 4 4 --seed 1 --out $(DEMO)/scans
	$(BIN)/spade-prepare $(DEMO)/scans --out $(DEMO)/store --spacing 4 4 4
	$(BIN)/spade-pretrain $(DEMO)/store --out $(DEMO)/pretrained --recipe spade --steps 50 --crop.shape 32 32 24
	$(BIN)/dagman-finetune $(DEMO)/store --out $(DEMO)/finetuned $(TUNING) --init $(DEMO)/pretrained/encoder.safetensors
	$(BIN)/dagman-finetune $(DEMO)/store --out $(DEMO)/scratch $(TUNING)
	$(BIN)/dagman-compare $(DEMO)/finetuned $(DEMO)/scratch --out $(DEMO)/comparison
	@echo
	@echo "Reports, to open in a browser:"
	@ls $(CURDIR)/$(DEMO)/*/report.html

test: $(VENV)/ready lint
	$(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/lint-imports --config setup.cfg

# Every script of benchmarks/speed, seven rounds of everything or more, then docs/speed.md. Each takes one core, so two run
# side by side, the longest first; those whose work is short (a neighbour costs them most), and the one that counts how
# long a step waits, have the machine to themselves.
BENCH_JOBS ?= 2
TOGETHER := encoder metrics sliding_window masked_student cases store body_frame
ALONE := correspondences selection views pretraining_step

bench: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,bench]"
	$(MAKE) --jobs=$(BENCH_JOBS) --output-sync=target $(TOGETHER:%=bench-%)
	$(MAKE) --jobs=1 $(ALONE:%=bench-%)
	$(BIN)/python benchmarks/tables.py

bench-%:
	@echo "== $*"
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed/$*.py

$(VENV)/ready: constraints.txt setup.cfg
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(INDEX) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(DEMO)
