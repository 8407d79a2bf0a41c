PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: help demo test test-all test-oldest test-newest lint docs docs-serve notebooks gpu clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/experiments  ## train a small net on real digits, measure every layer, draw it
	$(BIN)/python -m experiments.run demo

test: $(VENV)/test  ## run the tests, about twenty minutes; with JAXHESS_DATA_DIR also those on real data sets
	$(BIN)/python -m pytest -n 2 --max-worker-restart 0 --dist loadfile -m "not slow"

test-all: $(VENV)/test  ## run the tests, the slow ones at full size included
	$(BIN)/python -m pytest -n 2 --max-worker-restart 0 --dist loadfile

test-oldest:  ## test the library on the oldest JAX that setup.cfg admits, in its own environment
	.ci/library oldest

test-newest:  ## test the library on the newest JAX and Python, in its own environment
	.ci/library newest

lint: $(VENV)/lint  ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs  ## build the documentation in build/site; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/docs  ## serve the documentation and rebuild it when a file changes
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

notebooks: $(VENV)/test  ## run the notebooks and keep their figures in docs/figures
	$(BIN)/python -m notebooks.render

RUN = $(BIN)/python -m experiments.run

gpu: $(VENV)/experiments  ## measure speed, figure 1, tables 1 and 4 at full size; needs a GPU and JAXHESS_DATA_DIR; resumes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -c 'import jax; assert jax.default_backend() == "gpu", f"JAX sees no GPU, only {jax.devices()}"'
	for model in lenet vgg11 resnet18; do $(RUN) bench model=$$model batch_size=256 out=runs/gpu-bench-$$model || exit; done
	$(RUN) whole model=resnet18 dataset=cifar10 epochs=30 images_at_once=1000
	$(RUN) fig1 model=resnet18 dataset=cifar10 epochs=30 method=auto out=runs/gpu-fig1-resnet18-cifar10
	for model in vgg11 resnet18; do \
		$(RUN) table4 model=$$model dataset=cifar10 && $(RUN) table1 model=$$model dataset=cifar10 trials=5 || exit; done

# One stamp file for each set of extras, renewed when the metadata changes.
$(VENV)/%: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxhess needs Python 3.11 or later: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$*]"
	@touch $@

clean:  ## remove the environments and caches
	rm -rf $(VENV) .venv-oldest .venv-newest .cache .pytest_cache .ruff_cache .mypy_cache build *.egg-info
