#!/usr/bin/env bash
# Download the Oxford-IIIT Pet dataset (about 800 MB) and arrange it as data/cats/{train,val}/<breed>/.
# Interrupted, run it again: what has arrived whole is kept, and data/cats appears only when it is complete.
set -euo pipefail
cd "$(dirname "$0")/.."
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
PYTHONPATH=src exec "$python" -m tinycats.images.oxford_pets data/cats
