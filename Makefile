# Needs Python 3.11 to 3.13, make and a package index: the first target that is run builds .venv from the pinned requirements.
#   make run [ARGS="key=value ..."]    the default job (see `make run ARGS=--help`)
#   make sft ARGS="CONFIG ..."         supervised training
#   make test [JOBS=4]                 lint, types and the tests, in that many processes
#   make test-fast                     the tests without processes, connections, models and command lines
#   make test-long [JOBS=4]            the tests of whole jobs that `make test` leaves out
#   make chaos                         crashes, faults, shapes of ranks and whole trainings at length: about two hours
#   make sglang                        an environment with SGLang on this CPU, for rollout.engine=sglang
#   make test-sglang                   the tests against it
#   make test-gpu                      the tests on this machine's GPUs, against the CPU's numbers
#   make verifiers                     an environment with verifiers (areal_like/agents/verifiers_runner.py)
#   make test-verifiers                the tests against it
#   make openenv                       an environment with OpenEnv, whose servers task=openenv uses
#   make test-openenv                  the tests against it
#   make harbor                        an environment with Harbor and Python 3.12 (areal_like/agents/harbor_runner.py)
#   make test-harbor                   the tests against it
#   make clients                       environments with clients and frameworks of agents (tests/clients/requirements*.txt, package.json)
#   make test-clients                  the tests of sessions with them; ARGS=--write-table writes docs/reference/clients.md
#   make test-cluster                  the tests against real schedulers and a real Prometheus, of what is installed
#   make trl                           an environment with TRL, for benchmarks/trl.py
#   make docs                          the documentation as a web site in build/docs/html
#   make setup REQUIREMENTS=requirements-gpu.txt    for GPUs: the torch whose NCCL is SGLang's; later targets keep it
#   make PYTHON=/path/to/python3.12 ...  chooses the interpreter; PIP_ARGS="--index-url ..." goes to pip

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
PIP_ARGS ?=
# More processes than a small machine has cores, because many tests wait for timeouts and for other processes.
JOBS ?= 4
BIN := .venv/bin
# The choice of an earlier set-up stays, so that `make run` does not replace the torch for GPUs.
REQUIREMENTS ?= $(shell cat .venv/.requirements 2>/dev/null || echo requirements.txt)
# Named after the requirements' content and made last, so neither a change nor an interrupted set-up can leave a stale environment.
STAMP := .venv/.installed-$(shell cat $(REQUIREMENTS) requirements-dev.txt pyproject.toml | cksum | cut -d' ' -f1)
DOCS_STAMP := $(STAMP)-docs-$(shell cksum < requirements-docs.txt | cut -d' ' -f1)

# Bytecode is written even where the environment says otherwise (as in images of containers): each of the hundreds of processes
# that the tests start would compile the sources again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run sft test test-fast test-long chaos sglang test-sglang test-gpu verifiers test-verifiers openenv test-openenv harbor test-harbor clients test-clients test-cluster trl docs lint ruff format setup clean
.DEFAULT_GOAL := run

run: $(STAMP)
	@exec $(BIN)/python -m launch run $(ARGS)

sft: $(STAMP)
	@exec $(BIN)/python -m launch sft $(ARGS)

# The types are checked beside the first tests: mypy needs one core for most of a minute if it has no cache.
test: ruff
	@$(BIN)/mypy & types=$$!; \
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=25 --durations-min=1 $(ARGS); tests=$$?; \
	wait $$types || { echo "make test: mypy has found errors, printed above" >&2; exit 1; }; exit $$tests

# What is fast follows from what a test uses: tests/support/selection.py.
test-fast: $(STAMP)
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --fast $(ARGS)

test-long: $(STAMP)
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist load -m "long and not sglang" $(ARGS)

# Tests with Hypothesis draw the same examples each time elsewhere, and new ones here.
chaos: $(STAMP)
	@$(BIN)/python -m pytest -q -m hypothesis --hypothesis-profile=random $(ARGS)
	@$(BIN)/python -m pytest -q -m chaos $(ARGS)

sglang: $(STAMP)
	@PYTHON="$(PYTHON)" PIP_ARGS="$(PIP_ARGS)" tests/sglang/install.sh

test-sglang: sglang
	@$(BIN)/python -m pytest -q -m sglang tests/sglang $(ARGS)

# Without a GPU pytest would report that it has selected no test; this says why.
test-gpu: $(STAMP)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		exec $(BIN)/python -m pytest -q -m gpu $(ARGS); \
	else echo "make test-gpu: torch finds no GPU on this machine, so nothing was tested (see docs/guides/gpus.md)"; fi

verifiers: $(STAMP)
	@PYTHON="$(PYTHON)" PIP_ARGS="$(PIP_ARGS)" tests/support/build_environment.sh verifiers verifiers.v1 tests/verifiers/requirements.txt

test-verifiers: verifiers
	@$(BIN)/python -m pytest -q -m verifiers tests/verifiers $(ARGS)

openenv: $(STAMP)
	@PYTHON="$(PYTHON)" PIP_ARGS="$(PIP_ARGS)" tests/support/build_environment.sh openenv openenv.core.env_server tests/openenv/requirements.txt

test-openenv: openenv
	@$(BIN)/python -m pytest -q -m openenv tests/openenv $(ARGS)

harbor: $(STAMP)
	@PYTHON="$(PYTHON)" PIP_ARGS="$(PIP_ARGS)" tests/harbor/install.sh

test-harbor: harbor
	@$(BIN)/python -m pytest -q -m harbor tests/harbor $(ARGS)

clients: $(STAMP)
	@PYTHON="$(PYTHON)" PIP_ARGS="$(PIP_ARGS)" tests/clients/install.sh
	@NPM_ARGS="$(NPM_ARGS)" tests/clients/install_node.sh

test-clients: clients
	@$(BIN)/python -m pytest -q -m clients tests/clients $(ARGS)

test-cluster: $(STAMP)
	@$(BIN)/python -m pytest -q -m cluster tests/cluster $(ARGS)

trl: $(STAMP)
	@PYTHON="$(PYTHON)" PIP_ARGS="$(PIP_ARGS)" tests/support/build_environment.sh trl trl benchmarks/trl_environment/requirements.txt

docs: $(DOCS_STAMP)
	@$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --fresh-env -q -d build/docs/doctrees docs build/docs/html
	@echo "documentation: build/docs/html/index.html"

lint: ruff
	@$(BIN)/mypy

ruff: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(STAMP)
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

setup: $(STAMP)

$(STAMP):
	@test -f "$(REQUIREMENTS)" || { echo "REQUIREMENTS=$(REQUIREMENTS): no such file" >&2; exit 2; }
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.13 found: install one, or name it with 'make PYTHON=/path/to/python3.11 ...'" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "$(PYTHON) is not Python 3.11 to 3.13: name another with 'make PYTHON=...'" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@echo "setting up .venv (once; downloads PyTorch, so it can take some minutes)"
	@rm -f .venv/.installed-*
	@test -e .venv/.made && $(BIN)/python -c '' 2>/dev/null || { $(PYTHON) -m venv --clear .venv && touch .venv/.made; }
	@$(BIN)/python -m pip install -q -q --disable-pip-version-check --no-compile $(PIP_ARGS) -r $(REQUIREMENTS) -r requirements-dev.txt
	@$(BIN)/python -m pip install -q -q --disable-pip-version-check $(PIP_ARGS) --no-deps -e .
	@# On all cores, where pip would use one. Some packages carry templates that are not Python.
	@$(BIN)/python -m compileall -q -q -j 0 .venv/lib || true
	@echo "$(REQUIREMENTS)" > .venv/.requirements
	@touch $@

$(DOCS_STAMP): $(STAMP)
	@$(BIN)/python -m pip install -q -q --disable-pip-version-check $(PIP_ARGS) -r requirements-docs.txt
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
