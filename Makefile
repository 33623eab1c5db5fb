# Everything runs inside .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Two workers by default: each Triton-interpreter test is one Python thread.
WORKERS ?= 2

.PHONY: profile test lint figures notebooks gpu format clean
.DEFAULT_GOAL := profile

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): PyTorch is large, so the first time takes minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cuda,dev,notebooks]'
	@touch $@

# The pages show what it measured, and a test compares them with its files.
profile: $(STAMP)
	$(BIN)/python -m autotune profile $(ARGS)
	$(BIN)/python -m autotune figures

# Each worker computes on one thread: threads of two workers that share two cores wait for each other.
test: export OMP_NUM_THREADS ?= 1
test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=15 $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

figures: $(STAMP)
	$(BIN)/python -m autotune figures $(ARGS)

# In place. The profiler's warnings would stand in the outputs, and timestamps in the cells' metadata.
notebooks: NOTEBOOKS ?= notebooks/*.ipynb
notebooks: export TORCH_CPP_LOG_LEVEL ?= ERROR
notebooks: $(STAMP)
	$(BIN)/python -m nbconvert --to notebook --execute --inplace --ClearMetadataPreprocessor.enabled=True \
		--ClearMetadataPreprocessor.preserve_nb_metadata_mask=kernelspec \
		$(NOTEBOOKS) $(ARGS)

# With the machine's own Python, not .venv: a GPU machine brings the torch and triton that fit its driver.
gpu:
	$(PYTHON) -m autotune suite $(ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
