"""Where the processes of a cluster find each other: the store that torchrun keeps for its ranks.

Whoever reaches that store is trusted, as by everything in torch.distributed.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

FRONT = "front"  # "host port key" of the front's control port


def meeting_store(timeout: timedelta, is_front: bool = False) -> dist.Store:
    """The store of this attempt of this job. Raises ValueError outside of torchrun."""
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is not set: start this with torchrun") from None
    kept_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(host, port, is_master=is_front and not kept_by_agent, timeout=timeout,
                          wait_for_workers=False)  # fmt: skip
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"serving/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{attempt}", store)


def control_host() -> str:
    """Where the front listens for engines: on this machine alone if all ranks are here."""
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        return "127.0.0.1"
    return os.environ["MASTER_ADDR"]
