"""A cluster on one machine: virtual nodes (virtual_network.py), in each of them a real launch/torchrun.sh.

    sudo .venv/bin/python -m launch.virtual_cluster --nodes 2 --ranks-per-node 2 -- parallel.pp=4 steps=50
    ... --megabits 1000                  every node behind a link of 1 Gbit/s
    ... --lose 1@20                      after 20 seconds SIGKILL everything in node 1
    ... --restarts 3                     start an agent again that ended with an error, as a scheduler would

What follows `--` are Hydra overrides. Multi-node start, rendezvous, traffic between nodes, and the loss and return of
a node are the real thing; only the wire is not. Ctrl-C and SIGTERM are passed on to the agents, so that the run saves
and leaves; a second one ends everything. Linux and root only.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType

from launch.virtual_network import NetworkError, VirtualNetwork

ROOT = Path(__file__).resolve().parent.parent
BAD_CONFIG = 2  # exit code of launch/torchrun.sh for what will not work the second time either


class VirtualCluster:
    """One agent (launch/torchrun.sh) per node of a network; at the end of the block none of them is left.

    overrides       Hydra overrides of the run
    environment     further variables for the agents, e.g. MAX_RESTARTS or RDZV_CONF
    echo            print what agents say, with the node's name before each line
    """

    def __init__(
        self,
        network: VirtualNetwork,
        ranks_per_node: int,
        overrides: Sequence[str],
        environment: Mapping[str, str] | None = None,
        echo: bool = False,
    ) -> None:
        self.network = network
        self._overrides = list(overrides)
        self._environment = {
            **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
            "NNODES": str(network.nodes),
            "NPROC_PER_NODE": str(ranks_per_node),
            "MASTER_ADDR": network.hostname(0),
            "MASTER_PORT": "29500",
            **(environment or {}),
        }
        self._echo = echo
        self._said: list[list[str]] = [[] for _ in range(network.nodes)]
        self.agents: dict[int, subprocess.Popen[str]] = {}

    def start(self, node: int) -> None:
        """Start the agent of a node, for the first time or again."""
        words = ["env", f"NODE_RANK={node}", str(ROOT / "launch" / "torchrun.sh"), *self._overrides]
        agent = subprocess.Popen(
            self.network.command(node, words),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a Ctrl-C is ours to pass on
        )
        self.agents[node] = agent
        threading.Thread(target=self._listen, args=(node, agent), daemon=True).start()

    def start_all(self) -> None:
        for node in range(self.network.nodes):
            self.start(node)

    def output(self, node: int) -> str:
        """What the agents of this node have said so far."""
        return "".join(self._said[node])

    def lose(self, node: int) -> None:
        """SIGKILL to the agent of a node and all its ranks."""
        self.network.kill(node)
        self.agents[node].wait()

    def signal(self, number: signal.Signals) -> None:
        """To all agents that run."""
        for agent in self.agents.values():
            if agent.poll() is None:
                agent.send_signal(number)

    def codes(self) -> dict[int, int | None]:
        """The exit code of each node's agent, None while it runs."""
        return {node: agent.poll() for node, agent in self.agents.items()}

    def wait(self, timeout: float) -> dict[int, int | None]:
        """Until all agents have ended, or `timeout` seconds have passed."""
        deadline = time.monotonic() + timeout
        while None in self.codes().values() and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.codes()

    def __enter__(self) -> VirtualCluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for node, agent in self.agents.items():
            self.network.kill(node)
            agent.wait()

    def _listen(self, node: int, agent: subprocess.Popen[str]) -> None:
        for line in agent.stdout or ():
            self._said[node].append(line)
            if self._echo:
                print(f"{self.network.hostname(node)} | {line}", end="", flush=True)


def supervise(cluster: VirtualCluster, restarts: int, losses: Sequence[tuple[int, float]]) -> int:
    """Watch the agents until the run has ended; returns its exit code.

    restarts   how often an agent that ended with an error is started again
    losses     (node, seconds from now): when to lose which node
    """
    began = time.monotonic()
    to_lose = sorted(losses, key=lambda loss: loss[1])
    left = restarts
    while True:
        while to_lose and time.monotonic() - began >= to_lose[0][1]:
            node = to_lose.pop(0)[0]
            print(f"cluster | lost node{node}", flush=True)
            cluster.lose(node)
        codes = cluster.codes()
        failed = [node for node, code in codes.items() if code]
        if failed and (left == 0 or any(codes[node] == BAD_CONFIG for node in failed)):
            cluster.signal(signal.SIGTERM)
            codes = cluster.wait(60)
            return max(abs(code or 0) for code in codes.values())
        for node in failed[:left]:
            left -= 1
            print(f"cluster | node{node} ended with {codes[node]}, starting it again ({left} left)", flush=True)
            cluster.start(node)
        if all(code == 0 for code in codes.values()):
            return 0
        time.sleep(0.2)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.virtual_cluster", description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks-per-node", type=int, default=2)
    parser.add_argument("--megabits", type=float, default=0, help="rate of each node's link per second; 0: no limit")
    parser.add_argument("--restarts", type=int, default=0, help="agents started again after an error, in all")
    parser.add_argument("--lose", type=_loss, action="append", default=[], metavar="NODE@SECONDS")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, after --")
    chosen = parser.parse_args(arguments)
    for node, _ in chosen.lose:
        if node >= chosen.nodes:
            parser.error(f"--lose {node}@…: there are nodes 0 to {chosen.nodes - 1}")
    try:
        with (
            VirtualNetwork(chosen.nodes, chosen.megabits) as network,
            VirtualCluster(network, chosen.ranks_per_node, chosen.overrides, echo=True) as cluster,
        ):
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, _passing_on(cluster))
            cluster.start_all()
            return supervise(cluster, chosen.restarts, chosen.lose)
    except NetworkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _passing_on(cluster: VirtualCluster) -> Callable[[int, FrameType | None], None]:
    heard: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        if len(heard) > 1:
            sys.exit(128 + number)  # leaves the blocks of main, which clean up
        cluster.signal(signal.SIGTERM)

    return handle


def _loss(text: str) -> tuple[int, float]:
    node, _, seconds = text.partition("@")
    return int(node), float(seconds)


if __name__ == "__main__":
    sys.exit(main())
