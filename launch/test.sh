#!/usr/bin/env bash
# Run the whole test suite; arguments go to pytest, e.g. launch/test.sh -m "not slow".
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

make_environment dev
OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest "$@"
