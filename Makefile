PYTHON ?= python3
VENV ?= .venv
# ve: wheels for Linux x86_64; fixed: source, needs a C++ compiler
# (default: what is installed, else ve)
FAIRSEQ ?= $(firstword $(patsubst $(VENV)/installed-%,%,$(wildcard $(VENV)/installed-*)) ve)
# text file(s) to use instead of the demo's own corpus
CORPUS ?=
OUT ?= demo_out

BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed-$(FAIRSEQ)
REQUIREMENTS := $(wildcard requirements/*.txt) setup.py

.DEFAULT_GOAL := help
.PHONY: help install demo test check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED) ## make .venv with torch, fairseq and the plugin (FAIRSEQ=ve|fixed)

$(INSTALLED): $(REQUIREMENTS)
	@case "$(FAIRSEQ)" in ve|fixed) ;; *) \
		echo "FAIRSEQ is '$(FAIRSEQ)', must be ve or fixed" >&2; exit 2;; esac
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
		sys.exit(None if (3, 11) <= v <= (3, 12) else \
		"Python is %d.%d, must be 3.11 or 3.12: make PYTHON=python3.11 ..." % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/installed-*
	$(BIN)/pip install -q --disable-pip-version-check -r requirements/torch.txt -r requirements/base.txt
	$(BIN)/pip uninstall -q -y --disable-pip-version-check fairseq ve-fairseq fairseq-fixed
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation \
		--require-hashes -r requirements/fairseq-$(FAIRSEQ).txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: install ## pretrain three arms on real text and write demo_out/report.html (CORPUS=file)
	$(BIN)/python scripts/demo.py --validate-faiss --out $(OUT) $(if $(CORPUS),--corpus $(CORPUS))

test: install ## run every test
	$(BIN)/python -m pytest

check: install ## lint and type-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove the environment and what the demo wrote
	rm -rf $(VENV) $(OUT)
