# Two commands do everything: `make demo` shows it, `make test` checks it. Each makes its own environment.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-upgrade check simulate bench bench-databases bench-failover bench-start fuzz soak-age soak lock clean help

help:            ## what there is
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/  -/'

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Outlast needs Python 3.11 or later; say which with make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: $(READY)   ## three nodes, three services, kill -9 of the leader: about 30 s
	@$(BIN)/outlast demo

test: check      ## lint, types and every test
	$(BIN)/python -m pytest

test-upgrade: $(READY)  ## a real upgrade of an older commit, under load: make test-upgrade OLDER=COMMIT
	@folder=$$(mktemp -d) && git archive $(or $(OLDER),HEAD~1) | tar -x -C $$folder && \
	OUTLAST_OLDER=$$folder $(BIN)/python -m pytest tests/integration/test_upgrades.py -k older; \
	status=$$?; rm -rf $$folder; exit $$status

check: $(READY)  ## lint and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## transactions per second and latency
	$(BIN)/python -m tests.bench

bench-databases: $(READY)  ## two databases in one transaction, against a coordinator that keeps no log
	$(BIN)/python -m tests.bench.databases --json databases.json

bench-failover: $(READY)  ## how long it takes until all is over when the leader is gone
	$(BIN)/python -m tests.bench.failover --json failover.json

bench-start: $(READY)  ## how long nodes take to start that remember a million transactions
	$(BIN)/python -m tests.bench.old_age start

SEEDS ?= 1000
simulate: $(READY)  ## the whole cluster in one process, under any faults: make simulate SEEDS=1000
	$(BIN)/python -m tests.simulation --seeds $(SEEDS) --jobs $$(nproc)

MINUTES ?= 10
fuzz: $(READY)   ## bytes that nobody meant to send, for MINUTES=10; what fails is kept in .hypothesis and tried first
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

soak-age: $(READY)  ## load without end for MINUTES=10: memory and disk must level off
	$(BIN)/python -m tests.bench.old_age soak --minutes $(MINUTES)

SEED ?= 1
soak: $(READY)   ## everything that can fail, for MINUTES=10 from SEED=1, and a verdict; a report in soak-SEED/
	$(BIN)/outlast chaos --minutes $(MINUTES) --seed $(SEED) --report soak-$(SEED)

lock: $(READY)   ## write constraints.txt anew from what is installed
	$(BIN)/python -m pip freeze --exclude-editable > constraints.txt

clean:           ## remove the environment and what runs left behind
	rm -rf $(VENV) .outlast build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -rf soak-[0-9]* outlast-chaos-[0-9]* databases.json failover.json
