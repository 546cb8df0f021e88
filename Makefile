# Two commands do everything from a fresh clone: `make demo` and `make test`. Each sets up .venv first, if needed.
#
# torch: the pinned version is installed first and by itself. Where the package index offers a CPU build, it is taken;
# to choose another build (CPU wheels on a machine without a GPU, a CUDA build on one with), give its index:
#     make demo TORCH_INDEX=https://...

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
TORCH_INDEX ?=
INDEX := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),)
STEPS_PRETRAIN ?= 120
STEPS_FINETUNE ?= 120

.PHONY: demo test lint clean

demo: $(VENV)/ready
	rm -rf $(DEMO)
	$(BIN)/python -m spade3d.volumes.phantoms --kind abdomen-ct --patients 16 --unlabelled 8 --out $(DEMO)/scans --seed 1
	$(BIN)/spade-prepare $(DEMO)/scans --out $(DEMO)/store
	$(BIN)/spade-pretrain $(DEMO)/store --out $(DEMO)/pretrained --recipe spade --steps $(STEPS_PRETRAIN)
	$(BIN)/dagman-finetune $(DEMO)/store --out $(DEMO)/finetuned --labels 4 --steps $(STEPS_FINETUNE) \
		--init $(DEMO)/pretrained/encoder.safetensors
	$(BIN)/dagman-finetune $(DEMO)/store --out $(DEMO)/scratch --labels 4 --steps $(STEPS_FINETUNE)
	$(BIN)/dagman-compare $(DEMO)/finetuned $(DEMO)/scratch --out $(DEMO)/comparison
	@echo
	@echo "Reports, to open in a browser:"
	@ls $(CURDIR)/$(DEMO)/*/report.html

test: $(VENV)/ready lint
	$(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/lint-imports --config setup.cfg

$(VENV)/ready: constraints.txt setup.cfg
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(INDEX) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(DEMO)
