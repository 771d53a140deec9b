#!/usr/bin/env bash
# Train the default model on this machine: DualPipe on two processes, real text, nothing to prepare.
#
#   launch/quickstart.sh                            go on from its newest checkpoint, if there is one
#   launch/quickstart.sh steps=600 logger=none      any Hydra override
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

make_environment run
OMP_NUM_THREADS=1 exec .venv/bin/torchrun --nproc-per-node=2 train.py run=quickstart "$@"
