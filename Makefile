PYTHON ?= python3
VENV ?= .venv
# ve: wheels for Linux x86_64; fixed: source, needs a C++ compiler
# (default: what is installed, else ve)
FAIRSEQ ?= $(firstword $(patsubst $(VENV)/installed-%,%,$(wildcard $(VENV)/installed-*)) ve)
# text file(s) to use instead of the demo's own corpus
CORPUS ?=
OUT ?= demo_out
# where make benchmark writes
BENCHMARK ?= runs/benchmark

BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed-$(FAIRSEQ)
REQUIREMENTS := $(wildcard requirements/*.txt) setup.py

.DEFAULT_GOAL := help
.PHONY: help install demo demo-quick test test-triton check docs docs-serve benchmark benchmark-quick clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-15s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED) ## make .venv with torch, fairseq and the plugin (FAIRSEQ=ve|fixed)

$(INSTALLED): $(REQUIREMENTS)
	@case "$(FAIRSEQ)" in ve|fixed) ;; *) \
		echo "FAIRSEQ is '$(FAIRSEQ)', must be ve or fixed" >&2; exit 2;; esac
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
		sys.exit(None if (3, 11) <= v <= (3, 12) else \
		"Python is %d.%d, must be 3.11 or 3.12: make PYTHON=python3.11 ..." % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/installed-*
	$(BIN)/pip install -q --disable-pip-version-check -r requirements/torch.txt -r requirements/base.txt \
		-r requirements/huggingface.txt
	$(BIN)/pip uninstall -q -y --disable-pip-version-check fairseq ve-fairseq fairseq-fixed
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation \
		--require-hashes -r requirements/fairseq-$(FAIRSEQ).txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: install ## pretrain three arms on real text and write demo_out/report.html (CORPUS=file)
	$(BIN)/python scripts/demo.py --validate-faiss --out $(OUT) $(if $(CORPUS),--corpus $(CORPUS))

demo-quick: install ## the same with small sizes, into demo_quick_out, in a few minutes
	$(BIN)/python scripts/demo.py --preset quick --out demo_quick_out

test: install ## run every test, on all cores
	$(BIN)/python -m pytest -n auto --dist loadfile

test-triton: install ## run triton's kernels in its interpreter, on the CPU, against plain loops
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -r requirements/triton.txt
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto tests/unit/test_kernels.py -k triton

check: install ## lint and type-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install ## build the documentation site into site/
	$(BIN)/pip install -q --disable-pip-version-check -r requirements/docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

docs-serve: docs ## show the site at http://127.0.0.1:8000, and again after each change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

benchmark: install ## measure speed and memory into BENCHMARK, about an hour on an idle machine
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -r requirements/benchmark.txt
	mkdir -p $(BENCHMARK)
	$(BIN)/python scripts/benchmark_memory.py --json $(BENCHMARK)/benchmark.json \
		--markdown $(BENCHMARK)/benchmark.md --plot $(BENCHMARK)/benchmark.svg

benchmark-quick: install ## the same with small sizes, in less than two minutes
	mkdir -p $(BENCHMARK)
	$(BIN)/python scripts/benchmark_memory.py --quick --json $(BENCHMARK)/quick.json \
		--markdown $(BENCHMARK)/quick.md --plot $(BENCHMARK)/quick.svg

clean: ## remove the environment and what the demo wrote
	rm -rf $(VENV) $(OUT)
