"""Train a model. Start it with torchrun; configure it with Hydra overrides:

torchrun --nproc-per-node=2 train.py
torchrun --nproc-per-node=8 train.py parallel.pp=4 parallel.ep=2 data.seq_len=128 schedule=one_f_one_b
python train.py --cfg job                                    # print the composed configuration
python train.py dry_run=true launch.processes=2048 model=deepseek_v3_671b parallel.pp=16 parallel.ep=64   # on paper
python train.py --multirun optim.lr=1e-3,3e-3 run=rates      # one torchrun after the other
"""

from __future__ import annotations

import os
import sys
import warnings

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from training.config import from_hydra, register_schemas
from training.outcome import BAD_CONFIG, end_on_purpose
from training.sweep import JobFailed, run_job

register_schemas()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> float | None:
    sys.stderr = sys.__stderr__
    config, hydra_config = from_hydra(composed), HydraConfig.get()
    sweep = hydra_config.mode is RunMode.MULTIRUN
    if sweep and not config.dry_run:
        return run_job(__file__, config, list(hydra_config.overrides.task), hydra_config.job.num)
    from training.main import run

    code = run(config)
    if sweep:
        return code
    sys.exit(code)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
    if os.environ.get("RANK", "0") != "0":
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - a complaint about an override is wanted just once
    # Left to itself Hydra shows some mistakes as one line, others as a traceback; asked to raise, it leaves that to us.
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        main()
    except (HydraException, OmegaConfBaseException, ValueError, TypeError, JobFailed) as error:
        if wants_traceback:
            raise
        about = "a group, such as precision, takes one name: " if isinstance(error, TypeError) else ""
        cause = "" if error.__cause__ is None else f": {error.__cause__}"
        print(f"error: {about}{error}{cause}", file=sys.stderr, flush=True)
        sys.exit(end_on_purpose(BAD_CONFIG))  # the next try would end alike
