# Everyday commands. PYTHON is the interpreter of the environment you work in (make venv makes one).
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)

.PHONY: help venv build cubins wheel sdist test test-rust test-python test-isa test-cuda test-gpu compat lint format types bench demo ci clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-12s %s\n", $$1, $$2}'

venv: ## .venv with the package in editable form and everything its tests need
	python3 -m venv .venv
	.venv/bin/python -m pip install --upgrade pip
	.venv/bin/python -m pip install --editable '.[test,dev,bench]'

build: ## compile the Rust module into python/llama1m_ext (release profile)
	$(PYTHON) -m maturin develop --release

cubins: ## the CUDA kernels for sm_80 and sm_90a, with a pinned NVRTC from the package index; no CUDA needed
	$(PYTHON) csrc/build.py

wheel: cubins ## a manylinux wheel that carries the cubins, in dist/: for every Python from 3.10 on
	PATH="$(dir $(abspath $(PYTHON))):$$PATH" $(PYTHON) -m maturin build --release --zig --compatibility manylinux_2_28 --out dist

sdist: ## the source distribution, in dist/
	$(PYTHON) -m maturin sdist --out dist

test: test-rust test-python ## both suites

test-rust: ## cargo's tests; no Python needed
	cargo test

test-python: ## pytest, without the slow tests
	$(PYTHON) -m pytest

test-isa: ## the operations' tests and cargo's, once per ISA level of this machine
	@for level in $$($(PYTHON) -m llama1m_ext env --isa-levels); do \
	    echo "== LLAMA1M_ISA=$$level"; \
	    LLAMA1M_ISA=$$level $(PYTHON) -m pytest -q tests/python/test_attention.py tests/python/test_rope.py tests/python/test_merge.py tests/python/test_fuzz_ops.py tests/python/test_kv_formats.py || exit 1; \
	    LLAMA1M_ISA=$$level cargo test || exit 1; \
	done

test-cuda: ## the CUDA kernels without a GPU: emulated, with planted bugs, through NVRTC, behind a driver that is none
	$(PYTHON) tests/cuda/build.py --run
	$(PYTHON) tests/cuda/mutations.py
	$(PYTHON) -m pytest -q tests/python/test_cuda_gates.py
	$(PYTHON) -m tests.gpu --dry-run

test-gpu: ## all that needs a GPU, from the installed package; see tests/gpu/OWED.md
	$(PYTHON) -m tests.gpu

compat: ## what meets transformers, on each of its releases that we support: prints a table (an hour)
	$(PYTHON) tests/compat.py

lint: ## what CI refuses: format, clippy, ruff
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	cargo clippy --all-targets --features python -- -D warnings
	cargo clippy --all-targets --features python,cuda -- -D warnings
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check

format: ## format Rust and Python in place
	cargo fmt
	$(PYTHON) -m ruff check --fix
	$(PYTHON) -m ruff format

types: ## mypy over the package
	$(PYTHON) -m mypy

bench: ## both benchmarks, JSON and plots into bench-out/
	mkdir -p bench-out
	$(PYTHON) -m llama1m_ext bench attention --json bench-out/attention.json --plot bench-out/attention.png
	$(PYTHON) -m llama1m_ext bench decode --json bench-out/decode.json --plot bench-out/decode.png

demo: ## a needle in a book, through the model card's pipeline
	$(PYTHON) -m llama1m_ext demo

ci: ## all that CI runs
	.ci/run

clean: ## what builds and tests leave
	cargo clean
	rm -rf .ci/work bench-out dist python/llama1m_ext/cubins .pytest_cache .mypy_cache .ruff_cache .hypothesis
