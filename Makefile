# Every habit has one word. `make demo` and `make test` work alone on a fresh machine: scripts/bootstrap.py makes .venv,
# says what it downloads, and installs; a second call starts at once.

VENV ?= .venv
# The environment's own Python if there is one, else the first that is new enough. To choose: make demo PYTHON=python3.12
PYTHON ?= $(shell for p in $(VENV)/bin/python python3 python3.11 python3.12 python3.13 python3.14 python3.10; do \
	if $$p -I -S -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then echo $$p; exit; fi; \
	done; echo python3)
# Handed to pip install, for example where PyTorch's CPU wheels are to be found (docs/install.md).
PIP_ARGS ?=
# Handed to the command that a target runs: make demo ARGS="--out /tmp/demo", make test ARGS="-k beton".
ARGS ?=

BOOTSTRAP = @command -v $(firstword $(PYTHON)) >/dev/null 2>&1 || { \
	echo "relssl: no Python found ($(PYTHON)); install python3.11 and python3.11-venv" >&2; exit 1; }; \
	$(PYTHON) -I -S scripts/bootstrap.py --venv "$(VENV)" --pip-args "$(PIP_ARGS)"
PYTEST = "$(VENV)/bin/python" -m pytest -q

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast cifar-table status lint ffcv doctor clean distclean

help:  ## what there is
	@echo "make demo        images -> .beton -> ReSSL -> an evaluated backbone, on this machine, with a report"
	@echo "make test        the whole test suite"
	@echo "make test-fast   the tests of every day, under 3 minutes"
	@echo "make cifar-table every method on CIFAR-10, minutes each: does it learn anything here?"
	@echo "make status      docs/status.md: how far each method is proven, from the tests that prove it"
	@echo "make lint        ruff and mypy"
	@echo "make install     only the environment (.venv); then: . .venv/bin/activate"
	@echo "make ffcv        add FFCV, which the tests read our files with, or try again"
	@echo "make doctor      what this machine has and what is missing"
	@echo "make clean       remove caches and build leftovers;  make distclean: also .venv"
	@echo
	@echo "settings: VENV=.venv  PYTHON=python3.12  ARGS='...' (for the command)  PIP_ARGS='...' (for pip)"

install:
	$(BOOTSTRAP) demo

demo:
	$(BOOTSTRAP) demo
	@"$(VENV)/bin/relssl" demo $(ARGS)

test:
	$(BOOTSTRAP) test
	@$(PYTEST) --durations=10 $(ARGS)

test-fast:
	$(BOOTSTRAP) test
	@$(PYTEST) -m "not slow" -n auto --maxprocesses 4 --dist loadfile $(ARGS)

cifar-table:
	$(BOOTSTRAP) demo
	@"$(VENV)/bin/python" -m benchmarks.cifar_table $(ARGS)

status:
	$(BOOTSTRAP) test
	@"$(VENV)/bin/python" -m benchmarks.status $(ARGS)

lint:
	$(BOOTSTRAP) test
	@"$(VENV)/bin/ruff" check .
	@"$(VENV)/bin/python" -m mypy

ffcv:
	$(BOOTSTRAP) ffcv

doctor:
	$(BOOTSTRAP) demo
	@"$(VENV)/bin/relssl" doctor

clean:
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path "./$(VENV)" -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	@if [ -e "$(VENV)" ]; then rm -rf "$(VENV).old" && mv "$(VENV)" "$(VENV).old"; fi
	@rm -rf "$(VENV).old" "$(VENV).lock"
