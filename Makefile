# levelfield. `make` alone prints the targets; every target that needs the environment makes it first.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

PYTHON ?= python3
MATRIX ?= quick
ARGS ?=
ONLY ?=
comma := ,

VENV := .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python
LEVELFIELD := $(RUN) -m benchmark

.PHONY: help install benchmark slices doctor pack tables plots page report paper dashboard test check torture hostile lint fix clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  MATRIX=quick (a name in benchmark/settings/matrices/ or a .toml file), PYTHON=python3 (3.11 or newer), ARGS= (passed on)"

install: $(STAMP) ## make .venv with the tested versions (the other targets do this when it is missing or stale)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "levelfield needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1 || true). Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 2; }
	@echo "Installing into $(VENV) (once; torch is a large download) ..."
	@$(RUN) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

benchmark: $(STAMP) ## run MATRIX into runs/ and draw its tables, plots, page and report; again: resumes (ARGS=--publish: into results/)
	@$(LEVELFIELD) run --matrix $(MATRIX) $(ARGS)

slices: $(STAMP) ## run MATRIX defense by defense, in the file's order: every attack undefended first (ONLY=seed=0 takes a part)
	@$(RUN) -c 'from benchmark.settings.load import find_matrix, load_matrix; \
	  print(*dict.fromkeys(cell.defense_label for cell in load_matrix(find_matrix("$(MATRIX)")).cells), sep="\n")' | \
	while IFS= read -r defense; do \
	  $(LEVELFIELD) run --matrix $(MATRIX) --only "$(if $(ONLY),$(ONLY)$(comma))defense=$$defense" $(ARGS) </dev/null || exit; \
	done

doctor: $(STAMP) ## is MODEL backdoored? IMAGES: a folder of class folders (ARGS="--backbone torchvision:resnet18 --twins 12")
	@$(LEVELFIELD) doctor "$(MODEL)" --images "$(IMAGES)" $(ARGS)

pack: $(STAMP) ## pack MATRIX into build/rented for a rented GPU without a network, in parts of at most 60 MiB (ARGS="--limit 40")
	@$(RUN) -m benchmark.proof.rented pack --matrix $(MATRIX) $(ARGS)

tables: $(STAMP) ## tables of MATRIX from the rows of your run, or from the committed ones if there was none
	@$(LEVELFIELD) tables --matrix $(MATRIX) $(ARGS)

plots: $(STAMP) ## plots of MATRIX from the same rows
	@$(LEVELFIELD) plots --matrix $(MATRIX) $(ARGS)

page: $(STAMP) ## leaderboard.html of MATRIX from the same rows: sort, filter and open it in a browser, no network
	@$(LEVELFIELD) page --matrix $(MATRIX) $(ARGS)

report: $(STAMP) ## report of MATRIX from the same rows
	@$(LEVELFIELD) report --matrix $(MATRIX) $(ARGS)

paper: $(STAMP) ## tables, plots, page and report of every matrix that has a report in results/, and the exhibits, from the committed rows
	@for report in results/*/README.md; do \
	  [ -f "$$(dirname "$$report")/rows.csv" ] || continue; \
	  for verb in tables plots page report; do $(LEVELFIELD) $$verb --results results --matrix "$$(basename "$$(dirname "$$report")")" || exit; done; \
	done; $(LEVELFIELD) exhibits --results results

dashboard: $(STAMP) ## look at the W&B runs of MATRIX in the terminal, grouped by defense (no network, no account)
	@$(LEVELFIELD) dashboard --matrix $(MATRIX) $(ARGS)

test: $(STAMP) ## the tests, on up to four cores (ARGS="-k badnets" picks some, ARGS="-n 0 --pdb" debugs)
	@$(RUN) -m pytest -q -n auto --maxprocesses 4 --dist loadfile $(ARGS)

torture: $(STAMP) ## kill, starve and damage a small run, over and over; counts lost rows (ARGS="--kills 100 --executor local")
	@$(RUN) -m benchmark.proof.torture $(ARGS)

SECONDS ?= 0
hostile: $(STAMP) ## what strangers' files may try, as a table; SECONDS=900 feeds each reader nonsense for so long
	@LEVELFIELD_HOSTILE=results/proof LEVELFIELD_FUZZ=$(SECONDS) $(RUN) -m pytest -q tests/test_hostile.py tests/test_fuzz.py $(ARGS)

check: lint test ## lint, types, import contracts, then the tests

lint: $(STAMP) ## lint, types and import contracts alone
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy
	@$(VENV)/bin/lint-imports --no-logo

fix: $(STAMP) ## repair what the linter can repair by itself
	@$(RUN) -m ruff check --fix .

clean: ## remove caches of tools (the environment .venv, the trained models in .cache and the results in runs/ stay)
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage htmlcov build dist *.egg-info
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -not -path './.git/*' -prune -exec rm -rf {} +
