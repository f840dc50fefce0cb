# Two commands do everything: `make book` and `make test`. Each sets up .venv first, and does nothing twice.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v "$$p" && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
# Named after the folder: an environment that was moved or copied with it still imports from the old place.
READY := $(VENV)/.ready-$(shell pwd | cksum | cut -d' ' -f1)
STUDY ?= digits
ON ?= local

# What is said on the command line reaches the programs as data: neither make nor the shell executes anything in it.
override STUDY := $(value STUDY)
override ON := $(value ON)
override GPUS := $(value GPUS)
override AFRESH := $(value AFRESH)
override WITH := $(value WITH)
override BENCH := $(value BENCH)
export STUDY ON GPUS AFRESH WITH BENCH
# Appends --with=MODULE for each word of WITH to the arguments "$$@" of the program that follows.
MODULES = set -f; for module in $$WITH; do set -- "$$@" "--with=$$module"; done;

.DEFAULT_GOAL := help
.PHONY: help setup book test study publish bench export clean

help:
	@echo "make book                set up, run the digits studies, execute the chapters, render the site"
	@echo "make test                set up, run all tests"
	@echo "make study STUDY=digits  run a study of nbs/experiments/, or what is missing of it; ON=auto or"
	@echo "                         ON=ray://HOST:PORT on a Ray cluster, GPUS=0.5 for two runs per GPU,"
	@echo "                         AFRESH=1 also those that are published; WITH=my_module imports a module of"
	@echo "                         your own first, which registers what the study names (book, publish: too)"
	@echo "make publish STUDY=digits  gather its records into results/, and bring README.md up to date"
	@echo "make bench               time it beside what one would use instead; BENCH=--quick, BENCH=\"--only pgd\""
	@echo "make setup               what the others begin with: .venv, with everything pinned"
	@echo "make export              write repspace/ from the notebooks, and clean these"
	@echo "make clean               remove the site and everything else that make wrote, but for .venv,"
	@echo "                         this machine's records (runs/) and the published ones (results/)"

$(READY): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "Python 3.11 or newer is needed, and none was found. If there is one," \
		"name it: make PYTHON=/path/to/python3.12 …" >&2; exit 1; fi
	@echo "Setting up $(VENV) with $(PYTHON): two to five minutes, about 6 GB"
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and \
		f"Python 3.11 or newer is needed, and $(PYTHON) is {v}. Name another: make PYTHON=/path/to/python3.12 …")'
	@[ -x $(RUN) ] || $(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	@$(RUN) -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt \
		--no-build-isolation -e ".[book,test]"
	@$(RUN) -m pip check --disable-pip-version-check
	@touch $(READY)

setup: $(READY)

book: $(READY)
	@$(MODULES) $(RUN) book/build.py --study digits --study digits-2d "$$@"

test: $(READY)
	@$(RUN) -m pytest

study: $(READY)
	@$(MODULES) $(RUN) -m repspace.study --notebooks="_build/lab/$$STUDY" --on="$$ON" \
		$${GPUS:+--gpus="$$GPUS"} $${AFRESH:+--afresh} "$$@" -- "$$STUDY"

publish: $(READY)
	@$(MODULES) $(RUN) -m repspace.study publish "$$@" -- "$$STUDY"
	@$(RUN) book/readme.py

bench: $(READY)
	@set -f; $(RUN) -m benchmarks $$BENCH

export: $(READY)
	@find repspace -mindepth 1 -name '*.py' ! -path repspace/__init__.py -delete   # nbdev keeps what no notebook exports
	@$(VENV)/bin/nbdev_export
	@$(VENV)/bin/nbdev_clean

clean:
	rm -rf _build .pytest_cache repspace.egg-info
	find repspace tests book benchmarks -name __pycache__ -prune -exec rm -rf {} +
