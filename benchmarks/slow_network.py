"""Ranks on a slow network: virtual nodes behind rate-limited links (launch/virtual_network.py), one process per rank.

    with SlowNetwork(nodes=4, megabits=800) as network:
        outputs = network.run(["python", "-m", "benchmarks.some_worker"], ranks_per_node=1, timeout=300)

Ranks in one node talk over its loopback, which is not limited. Sockets have small buffers: large ones would take in
whole messages, and hide for a while how slow the link is. Linux and root only.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.virtual_network import INTERFACE, NetworkError, VirtualNetwork


@dataclass
class SlowNetwork(VirtualNetwork):
    """`nodes` nodes, each behind a link of `megabits` per second and direction (0: not limited)."""

    socket_bytes: int | None = 262_144

    def run(
        self, command: Sequence[str], ranks_per_node: int = 1, timeout: float = 300, cwd: Path | None = None
    ) -> list[str]:
        """Run one process per rank, with RANK, WORLD_SIZE, LOCAL_RANK and STORE (a file for rendezvous) set.

        Returns what each printed. Raises NetworkError with the output of the first rank that fails.
        """
        world = self.nodes * ranks_per_node
        with tempfile.TemporaryDirectory() as folder:
            running = []
            for rank in range(world):
                env = dict(
                    os.environ,
                    RANK=str(rank),
                    WORLD_SIZE=str(world),
                    LOCAL_RANK=str(rank % ranks_per_node),
                    LOCAL_WORLD_SIZE=str(ranks_per_node),
                    STORE=f"{folder}/store",
                    GLOO_SOCKET_IFNAME=INTERFACE,
                    OMP_NUM_THREADS="1",
                )
                inside = self.command(rank // ranks_per_node, command)
                output = open(f"{folder}/{rank}", "w+")  # noqa: SIM115 - closed below, after the process
                process = subprocess.Popen(inside, env=env, stdout=output, stderr=subprocess.STDOUT, cwd=cwd)
                running.append((process, output))
            try:
                return _collect(running, timeout)
            finally:
                for process, output in running:
                    process.kill()
                    process.wait()
                    output.close()


def _collect(running: Sequence[tuple[subprocess.Popen[bytes], object]], timeout: float) -> list[str]:
    import time

    deadline = time.monotonic() + timeout
    waiting = dict(enumerate(running))
    while waiting:
        for rank, (process, output) in list(waiting.items()):
            code = process.poll()
            if code is None:
                continue
            del waiting[rank]
            if code:
                output.seek(0)  # type: ignore[attr-defined]
                raise NetworkError(f"rank {rank} ended with {code}:\n{output.read()}")  # type: ignore[attr-defined]
        if time.monotonic() > deadline:
            raise NetworkError(f"ranks {sorted(waiting)} did not finish in {timeout:.0f} s")
        time.sleep(0.05)
    texts = []
    for _, output in running:
        output.seek(0)  # type: ignore[attr-defined]
        texts.append(output.read())  # type: ignore[attr-defined]
    return texts
