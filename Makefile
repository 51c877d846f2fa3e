# Everything runs in its own .venv; `make setup` is part of each target and does nothing the second time.
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions

BENCHMARKS := tiny_tensors memory stall interference throughput reshard incremental frozen_vocab attach sampler state_fuzz hostile crash matrix

.PHONY: setup demo test check bench kernels clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt .ci/setup
	.ci/setup $(VENV)
	touch $@

demo: setup
	$(BIN)/python -m benchmarks.demo

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: setup
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name --json benchmarks/results/$$name.json || exit 1; done
	$(BIN)/python -m benchmarks.stall --tiny --json benchmarks/results/stall_tiny.json
	$(BIN)/python -m benchmarks.scale --json benchmarks/results/scale.json --plot benchmarks/results/scale.svg
	$(BIN)/python -m benchmarks.summary

# Packing on a GPU in CUDA C++; without it Triton does the same.
kernels:
	nvcc -std=c++17 -O3 -gencode arch=compute_90,code=sm_90 --shared -Xcompiler -fPIC \
		kernels/engine_kernels/pack_checksum/pack_checksum.cu -o kernels/engine_kernels/pack_checksum/libpack_checksum.so

clean:
	rm -rf $(VENV) runs build dist *.egg-info
