# The newcomer's two commands are `make demo` and `make test`; both install what they need into .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
# ARGS are configuration overrides: make demo ARGS="train.steps=20 optimizer.lr=1e-4".
# pip's own index options stay the user's: set PIP_INDEX_URL and the like as usual.

INSTALLED := $(VENV)/.installed

.PHONY: install demo demo-tp2 demo-tp2pp2 demo-rollout test test-full test-unit test-cluster check lint docs clean

install: $(INSTALLED)

$(INSTALLED): setup.py pyproject.toml $(wildcard erollout/kernels/cpp/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e ".[mlflow,modelopt,ray,benchmark,dev]"
	touch $@

demo: install
	$(BIN)/erollout demo --config configs/demo.yaml $(ARGS)

demo-tp2: install
	$(BIN)/erollout demo --config configs/demo-tp2.yaml $(ARGS)

demo-tp2pp2: install
	$(BIN)/erollout demo --config configs/demo-tp2pp2.yaml $(ARGS)

# Fetches SmolLM2-135M and fine-tunes it on first use; both are cached in ~/.cache/erollout.
demo-rollout: install
	$(BIN)/erollout demo-rollout --config configs/demo-rollout.yaml $(ARGS)

# Every guarantee once, on small tables. A worker that is out of tests takes half of what the other one has left.
test: install
	$(BIN)/pytest -n 2 --dist worksteal

# And the long tables, more kinds of interruption, a Ray and a Slurm cluster on this machine.
test-full: install
	$(BIN)/pytest -n 2 --dist worksteal -m "not cluster"

test-unit: install
	$(BIN)/pytest -n 2 -m "not (distributed or end_to_end or slurm or ray or full or cluster)"

# Launching and surviving, in full: real Slurm and Ray clusters on this machine, kills at random. About 20 minutes.
test-cluster: install
	$(BIN)/pytest -n 2 --dist loadfile -m "slurm or ray or cluster"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test-unit

# README's pages as a site, in build/site.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) runs build *.egg-info erollout/kernels/_native*.so
