# make setup   a virtual environment in .venv with everything in requirements.txt
# make smoke   train the classifier on the built-in toy cats, in about a minute
# make test    lint, and every test, the slow and the end-to-end ones included
# make lint    ruff, check and format

PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup smoke test lint bubblewrap

setup: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@

smoke: setup
	$(BIN)/python src/train.py data/toy --epochs 6 --batch-size 16 --lr 1e-3

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The tests' containers need bubblewrap: installed if that is possible here, else an error that says how.
bubblewrap:
	@command -v bwrap >/dev/null || { \
	  sudo=$$([ "$$(id -u)" = 0 ] || echo sudo --non-interactive); \
	  { $$sudo apt-get update --quiet=2 && $$sudo apt-get install --quiet=2 --yes bubblewrap; } >/dev/null 2>&1; \
	  command -v bwrap >/dev/null; \
	} || { echo "error: the tests need bubblewrap, on Linux: sudo apt-get install bubblewrap" >&2; exit 1; }

# A core for each of the tests' processes: with threads of their own they would wait for one another.
test: lint bubblewrap
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal
