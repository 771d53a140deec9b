#!/usr/bin/env bash
# Run the whole test suite, two files at a time; arguments go to pytest, e.g. launch/test.sh -m "not slow".
# TEST_WORKERS=1 … how many at a time; 0: in one process.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

make_environment dev
# The order of the files is that of tests/conftest.py, not by how many tests they have.
workers=(--numprocesses="${TEST_WORKERS:-2}" --dist=loadfile --no-loadscope-reorder)
export OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= # hundreds of processes import our modules: compiled once
exec .venv/bin/python -m pytest "${workers[@]}" "$@"
