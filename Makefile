# Two commands do everything: `make book` and `make test`. Each sets up .venv first, and does nothing twice.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11, 5))' 2>/dev/null && command -v "$$p" && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
# Stamps are named after the folder: an environment that was moved or copied still imports from the old place.
PLACE := $(shell pwd | cksum | cut -d' ' -f1)
BOOK := $(VENV)/.book-$(PLACE)
TEST := $(VENV)/.test-$(PLACE)
STUDY ?= digits
ON ?= local
# What the user writes behind a variable reaches the programs as data: neither make nor the shell expands it.
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
.PHONY: help setup book test study publish bench export pins clean

help:
	@echo "make book                set up, run the digits studies, execute the chapters, render the site"
	@echo "make test                set up, run all tests but the long ones; DEEP=1 runs these"
	@echo "make study STUDY=digits  run a study of nbs/experiments/, or what is missing of it; ON=auto or"
	@echo "                         ON=ray://HOST:PORT on a Ray cluster, GPUS=0.5 for two runs per GPU,"
	@echo "                         AFRESH=1 also those that are published; WITH=my_module imports a module of"
	@echo "                         your own first, which registers what the study names (book, publish: too)"
	@echo "make publish STUDY=digits  gather its records into results/, and bring README.md up to date"
	@echo "make bench               time it beside what one would use instead; BENCH=--quick, BENCH=\"--only pgd\""
	@echo "make setup               what test begins with: .venv, everything pinned, each file by its hash"
	@echo "make export              write repspace/ from the notebooks, and clean these"
	@echo "make pins                choose the pinned versions anew and write them into locks/; needs uv"
	@echo "make clean               remove the site and everything else that make wrote, but for .venv,"
	@echo "                         this machine's records (runs/) and the published ones (results/)"

# An environment with all that locks/$(1).txt pins, and this project in it; $(2) says how long and how large.
define install
	@if [ -z "$(PYTHON)" ]; then echo "Python 3.11.5 or newer is needed, and none was found. If there is one," \
		"name it: make PYTHON=/path/to/python3.12 …" >&2; exit 1; fi
	@echo "Setting up $(VENV) with $(PYTHON): $(2)"
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11, 5) and \
		f"Python 3.11.5 or newer is needed, and $(PYTHON) is {v}. Name another: make PYTHON=/path/to/python3.12 …")'
	@[ -x $(RUN) ] || $(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes -r locks/build.txt
	@$(RUN) -m pip install --disable-pip-version-check --progress-bar off --require-hashes -r locks/$(1).txt
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(RUN) -m pip check --disable-pip-version-check
endef

$(BOOK): pyproject.toml locks/build.txt locks/book.txt
	$(call install,book,two to five minutes$(comma) about 6 GB)
	@touch $(BOOK)

# What the tests need contains what the book needs, so that either may come first and takes nothing away.
$(TEST): pyproject.toml locks/build.txt locks/book.txt locks/test.txt
	$(call install,test,two to five minutes$(comma) about 6 GB)
	@touch $(BOOK) $(TEST)

comma := ,

setup: $(TEST)

book: $(BOOK)
	@$(MODULES) $(RUN) book/build.py --study digits --study digits-2d "$$@"

test: $(TEST)
	@$(RUN) -m pytest -n auto --maxprocesses=4 --dist loadgroup $(if $(DEEP),-m deep)

study: $(BOOK)
	@$(MODULES) $(RUN) -m repspace.study --notebooks="_build/lab/$$STUDY" --on="$$ON" \
		$${GPUS:+--gpus="$$GPUS"} $${AFRESH:+--afresh} "$$@" -- "$$STUDY"

publish: $(BOOK)
	@$(MODULES) $(RUN) -m repspace.study publish "$$@" -- "$$STUDY"
	@$(RUN) book/preregistered.py || true   # without the repository's history every row stays exploratory
	@$(RUN) book/readme.py

bench: $(TEST)
	@set -f; $(RUN) -m benchmarks $$BENCH

export: $(BOOK)
	@find repspace -mindepth 1 -name '*.py' ! -path repspace/__init__.py -delete   # nbdev keeps what no notebook exports
	@$(VENV)/bin/nbdev_export
	@$(VENV)/bin/nbdev_clean

# Versions are chosen for Python 3.11.5 to 3.14 on all systems at once. Delete locks/ first to have the newest of all.
pins:
	@command -v uv >/dev/null || { echo "make pins needs uv (pip install uv), the only thing here that does" >&2; exit 1; }
	@mkdir -p locks
	@printf 'setuptools>=77\nwheel\n' | $(LOCK) -o locks/build.txt -
	@$(LOCK) --extra test -o locks/test.txt pyproject.toml
	@$(LOCK) --extra book -c locks/test.txt -o locks/book.txt pyproject.toml

LOCK := uv pip compile --quiet --universal --python-version 3.11.5 --generate-hashes --no-header --no-annotate

clean:
	rm -rf _build .pytest_cache repspace.egg-info
	find repspace tests book benchmarks -name __pycache__ -prune -exec rm -rf {} +
