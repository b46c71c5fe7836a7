# make setup   a virtual environment in .venv with everything in requirements.txt
# make smoke   train the classifier on the built-in toy cats
# make test    lint, and every test, the slow and the end-to-end ones included
# make test FAST=1   without the slow ones, for work in progress
# make campaign   whatever can happen to a run, at random and hundreds of times; takes twenty-five minutes
# make gpu     what only a GPU can show; says so where there is none
# make lint    ruff, check and format, and mypy

PYTHON ?= python3
BIN := .venv/bin

# What is imported is compiled once, and not by each of the hundreds of processes that the tests start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup smoke test gpu campaign lint system-packages imported

setup: .venv/installed

# uv installs in a fraction of pip's time; but it does not read pip's settings, and where those are needed pip does it.
.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirement requirements.txt || \
	  $(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@

smoke: setup
	$(BIN)/python src/train.py data/toy --epochs 3 --batch-size 16 --lr 1e-3

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tests' containers need bubblewrap, and the gallery's tests a browser: installed if that is possible here, else an
# error that says how.
system-packages:
	@is_there() { command -v bwrap && { command -v chromium || command -v chromium-browser; }; } >/dev/null; \
	is_there || { \
	  sudo=$$([ "$$(id -u)" = 0 ] || echo sudo --non-interactive); \
	  { $$sudo apt-get update --quiet=2 && \
	    $$sudo apt-get install --quiet=2 --yes --no-install-recommends bubblewrap chromium; } >/dev/null 2>&1; \
	  is_there; \
	} || { echo "error: the tests need two programs, on Linux: sudo apt-get install bubblewrap chromium" >&2; exit 1; }

# What is imported first is compiled; four of the tests' processes would all do so.
imported: setup
	$(BIN)/python -c "import modal, torch.utils.tensorboard, torchvision.transforms.v2"

# A thread for each of the tests' processes: with more they would wait for one another. Four processes have two cores to
# do: half of the time they wait for the containers of the stand-in. Tests are handed out one by one, the slow ones first.
test:
	$(MAKE) --jobs 3 --output-sync lint system-packages imported
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 4 --dist load --maxschedchunk 1 $(if $(FAST),-m "not slow")

gpu: setup
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python benchmarks/gpu.py

campaign: setup system-packages
	$(BIN)/python tests/campaign.py
