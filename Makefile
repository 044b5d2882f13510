# Everything here works in a fresh clone that has python3 (3.11 or newer) and pip. `make help` lists what there is.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv train test test-slow test-peers fuzz check bench peers policy clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .peers
RESULTS := runs/benchmarks
SECONDS_OF_TRAINING ?= 165
EXAMPLES ?= 100000

# trl supplies chat templates for the tests and nothing else, so what it depends on stays away.
TEMPLATES := trl==1.16.0

# Of pip's pages, one line for each large download and every error; the rest is in the log.
LOG := $(VENV)/install.log
PIP := $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off -c constraints.txt
BRIEF := 2>&1 | tee -a $(LOG) | awk ' \
	/^ *(Downloading|Using cached) .*[MG]B\)/ { size = substr($$(NF - 1), 2) + 0; \
		if (size >= 5 || $$NF == "GB)") { split($$(NF - 2), part, "-"); print "  " part[1], part[2], $$(NF - 1), $$NF; fflush() } } \
	/^Installing collected/ { print "  unpacking", split($$0, part, ","), "packages"; fflush() } \
	/^ *ERROR/ { print > "/dev/stderr"; failed = 1 } \
	END { if (failed) print "  the whole log: $(LOG)" > "/dev/stderr" }'

help:
	@echo "make train      train the tiny policy on the calculator in this terminal, and show what it gained"
	@echo "make test       the tests"
	@echo "make test-slow  the slow tests: the MCP Inspector, where npm is, and its page in a browser, where Chromium is; kills"
	@echo "make test-peers  the tests that need a real vLLM: its CPU build, 3 GB, in $(PEERS)/vllm (10 minutes)"
	@echo "make fuzz       the fuzzing tests with EXAMPLES=100000 for each of parser, evaluator and config loader (10 minutes)"
	@echo "make check      formatting, lints, types, the order of the rooms, the house numbers"
	@echo "make venv       $(VENV) with everything for development; the other targets make what they need by themselves"
	@echo "make bench      speed against peers in turns, one JSON file each in $(RESULTS)/ (15 minutes on a quiet machine)"
	@echo "make peers      $(PEERS)/ with what tests and benchmarks use beside this project: the MCP Inspector, vLLM's CPU build, verifiers, SmolLM2"
	@echo "make policy     build the tiny policy anew from nothing (tens of minutes; replaces the weights in the package)"
	@echo "make clean      remove $(VENV), caches and builds; runs/ stays"

venv: $(VENV)/.dev
	@echo "$(VENV) is ready"

train: $(VENV)/.local
	@$(BIN)/art-mcp train calculator --seconds $(SECONDS_OF_TRAINING)

test: $(VENV)/.dev
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

test-slow: $(VENV)/.dev
	@if command -v npm >/dev/null; then $(MAKE) -s $(PEERS)/inspector/.made; fi
	@$(BIN)/python -m pytest -m slow -rs

test-peers: $(VENV)/.dev
	@$(MAKE) -s $(PEERS)/vllm/.made
	@$(BIN)/python -m pytest -m peers -rs

fuzz: $(VENV)/.dev
	@FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest tests/fuzz -vv

check: $(VENV)/.dev
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright
	@$(BIN)/lint-imports
	@$(BIN)/python -m pytest tests/test_house.py

bench: $(VENV)/.local
	@for name in parser template tool_calls tool_cpu start; do \
		echo "$$name"; $(BIN)/python -m benchmarks.$$name --out $(RESULTS)/$$name.json; done

peers: $(PEERS)/inspector/.made $(PEERS)/vllm/.made $(PEERS)/verifiers/.made $(PEERS)/smollm2/.made

policy: $(VENV)/.local
	@$(BIN)/python scripts/build_tiny_policy.py

clean:
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	@find art_mcp servers environments tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "art_mcp needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1 || true). Name another: make PYTHON=python3.12 …" >&2; \
		exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.local: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing art_mcp with torch and transformers into $(VENV): once, some minutes"
	@$(PIP) -e '.[local]' $(BRIEF)
	@touch $@

$(VENV)/.dev: $(VENV)/.local
	@echo "Installing what development needs"
	@$(PIP) -e '.[local,dev]' $(BRIEF)
	@$(PIP) --no-deps $(TEMPLATES) $(BRIEF)
	@touch $@

$(PEERS)/inspector/.made: tests/slow/package.json
	@echo "Installing the MCP Inspector and a node for it into $(@D): once, half a minute"
	@mkdir -p $(@D)
	@cp $< $(@D)/package.json
	@cd $(@D) && npm install --no-package-lock --no-audit --no-fund --loglevel error
	@touch $@

# Exactly what is listed, so nothing is resolved. vLLM's list needs a CPU build of torch: where pip's settings offer none, name
# a place that has it with PIP_FIND_LINKS.
$(PEERS)/%/.made: benchmarks/peers/%.txt
	@$(MAKE) -s $(VENV)/.made
	@echo "Installing $* into $(@D): once, some minutes"
	@rm -rf $(@D)
	@$(BIN)/python -m venv $(@D)
	@$(@D)/bin/python -m pip --disable-pip-version-check install --progress-bar off --no-deps -r $< $(BRIEF)
	@touch $@
