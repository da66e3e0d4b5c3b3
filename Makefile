# make train | make test | make lint | make docs; everything installs into .venv by itself.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRA ?=
comma := ,
COMPILER := $(if $(filter Linux,$(shell uname -s)),gpu-compiler)

.PHONY: install gpu-compiler train test test-all test-latest lint docs clean
install: $(VENV)/installed$(EXTRA)

$(VENV)/installed$(EXTRA): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is older; try make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev$(if $(EXTRA),$(comma)$(EXTRA))]'
	@touch $@

# jax's CUDA plugin, ptxas and nvdisasm, to compile for GPUs without one (300 MB, no driver); in a folder of
# its own, because jax would look for a driver wherever it finds the plugin.
gpu-compiler: $(VENV)/gpu-compiler/installed

$(VENV)/gpu-compiler/installed: $(VENV)/installed$(EXTRA)
	@version=$$($(BIN)/python -c 'import jax; print(jax.__version__)'); \
	  $(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/gpu-compiler \
	  jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version nvidia-cuda-nvcc nvidia-cuda-nvdisasm
	@touch $@

train: install
	$(BIN)/python recipes/train_cnn.py --mesh data=2,height=2,channel=2 --compare --out runs/digits

test: install $(COMPILER)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: install $(COMPILER)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The suite on the newest jax, which needs Python 3.12 or newer.
test-latest:
	@sh tools/test_latest.sh

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy shardtrain recipes tools

# The site in site/; broken links and references are errors. Nothing but the installation needs a network.
docs: install $(VENV)/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

$(VENV)/docs-installed: pyproject.toml $(VENV)/installed$(EXTRA)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-latest build site *.egg-info
