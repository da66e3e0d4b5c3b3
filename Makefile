# make train | make test | make lint; everything installs into .venv by itself.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRA ?=
comma := ,

.PHONY: install train test test-all test-latest lint clean
install: $(VENV)/installed$(EXTRA)

$(VENV)/installed$(EXTRA): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is older; try make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev$(if $(EXTRA),$(comma)$(EXTRA))]'
	@touch $@

train: install
	$(BIN)/python recipes/train_cnn.py --mesh data=2,height=2,channel=2 --compare --out runs/digits

test: install
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: install
	$(BIN)/python -m pytest -n 2

# The suite on the newest jax, which needs Python 3.12 or newer.
test-latest:
	@sh tools/test_latest.sh

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy shardtrain recipes tools

clean:
	rm -rf $(VENV) .venv-latest build *.egg-info
