"""Train a model. Start it with torchrun; configure it with Hydra overrides:

torchrun --nproc-per-node=2 train.py
torchrun --nproc-per-node=8 train.py parallel.pp=4 parallel.ep=2 data.seq_len=128 schedule=one_f_one_b
python train.py --cfg job          # print the composed configuration
"""

from __future__ import annotations

import os
import sys
import warnings

import hydra
from omegaconf import DictConfig

from training.config import from_hydra, register_schemas

register_schemas()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> None:
    sys.stderr = sys.__stderr__
    from training.main import run

    sys.exit(run(from_hydra(composed)))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
    if os.environ.get("RANK", "0") != "0":
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - Hydra's complaint about an override is wanted just once
    main()
