# SGLANG, VENV, PYTHON, HOST, PORT and MODEL are explained in scripts/install_cpu.sh and scripts/serve.sh.
SGLANG ?= 0.5.17
VENV ?= $(CURDIR)/.venv$(patsubst %,-%,$(filter-out 0.5.17,$(SGLANG)))
# Without a virtual environment the project was installed into an existing GPU installation.
PY = $(shell [ -x $(VENV)/bin/python ] && echo $(VENV)/bin/python || echo $(or $(PYTHON),python3))
export SGLANG VENV PYTHON HOST PORT MODEL
# It would have every server process compile the whole of SGLang anew, which triples its start.
unexport PYTHONDONTWRITEBYTECODE

# With 0.5.17 all tests run but the short ones of real servers; with a further version these and those of the adapter.
TESTS_0.5.17 = --ignore test/test_server_smoke.py
TESTS_0.5.23 = test/test_compat.py test/test_hooks.py test/test_refusals.py test/test_server_smoke.py

.DEFAULT_GOAL := help
.PHONY: help install model serve test test-gpu bench-gpu soak lint type docs-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## install the server and this project into .venv (or VENV=DIR); SGLANG=0.5.23: that version, beside it
	@scripts/install_cpu.sh

model: install ## fetch and convert the default model into the user's cache; prints its path
	@$(PY) -m sglang_mosaic.embedded_model

serve: install ## serve on 127.0.0.1:30000; HOST=, PORT=, MODEL=, ARGS="--more --flags"
	@scripts/serve.sh $(ARGS)

test: install model ## run the whole test suite, with SGLANG=0.5.23 a short one; PYTEST_ARGS="-k name"
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(TESTS_$(SGLANG)) $(PYTEST_ARGS)

test-gpu: install ## run the tests that have something to do there on this machine's GPU
	@$(PY) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu: torch sees no CUDA device")'
	@$(PY) -m pytest test/test_kernels_*.py test/test_decode_attention.py test/test_prefill_attention.py test/test_host_*.py $(PYTEST_ARGS)

bench-gpu: install ## measure this machine's GPU into benchmark/results/; ARGS="--only steps --out DIR"
	@$(PY) scripts/bench_gpu.py $(ARGS)

soak: install model ## 20 minutes of load and faults; writes soak.json and soak.png; ARGS="--minutes 2"
	@$(PY) benchmark/soak/run.py --json soak.json --png soak.png $(ARGS)

lint: install ## check the code with ruff
	@$(PY) -m ruff check .

type: ## check types with mypy: strict below the adapter
	@$(PY) -m mypy

docs-check: install model ## run the commands of all documents, shortened, but for those that need a GPU; ARGS=docs/manager.md
	@$(PY) scripts/docs_check.py $(ARGS)

clean: ## remove caches and build outputs; the virtual environment and the model stay
	@rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find python kernels test -type d -name __pycache__ -prune -exec rm -rf {} +
