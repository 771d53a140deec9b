"""A slow network on one machine: each node is a Linux network namespace behind a rate-limited link.

    with SlowNetwork(nodes=4, megabits=800) as network:
        outputs = network.run(["python", "-m", "benchmarks.some_worker"], ranks_per_node=1, timeout=300)

Every namespace has one network interface, `link0`, a veth whose other end is a port of a common bridge. What leaves
it is shaped by `tc … tbf` (token bucket) to the given rate, in every namespace alike, so a link is full duplex like a
real one. Inside tbf flows share the link fairly (fq_codel), as queue pairs of a real card do: a message of a few bytes
does not wait for megabytes of another connection. Ranks in one namespace talk over its loopback, which is not limited.

Needs root and the tools `ip` and `tc` (Debian: iproute2). Names carry the process id; everything is removed at the end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

INTERFACE = "link0"
BURST_SECONDS = 1e-3  # how much tbf lets through at once: what a timer tick of the kernel needs
MTU = 9000
SOCKET_BYTES = int(os.environ.get("SB", 262144))


class NetworkError(RuntimeError):
    """The slow network cannot be made here, or a rank on it failed; the message says why."""


@dataclass
class SlowNetwork:
    """`nodes` namespaces, each behind a link of `megabits` per second and direction (0: not limited)."""

    nodes: int
    megabits: float
    _made: list[list[str]] = field(default_factory=list)  # commands that undo what was done

    def __enter__(self) -> SlowNetwork:
        check_tools()
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._remove()

    @property
    def _prefix(self) -> str:
        return f"sn{os.getpid()}"

    def name(self, node: int) -> str:
        return f"{self._prefix}n{node}"

    def _build(self) -> None:
        bridge = f"{self._prefix}b"
        _sh("ip", "link", "add", bridge, "type", "bridge")
        self._made.append(["ip", "link", "del", bridge])
        _sh("ip", "link", "set", bridge, "mtu", str(MTU), "up")
        for node in range(self.nodes):
            space, outside = self.name(node), f"{self._prefix}v{node}"
            _sh("ip", "netns", "add", space)
            self._made.append(["ip", "netns", "del", space])
            ends = ("type", "veth", "peer", "name", INTERFACE, "netns", space)
            _sh("ip", "link", "add", outside, "mtu", str(MTU), *ends)
            self._made.append(["ip", "link", "del", outside])  # at once; the namespace's end goes with it
            _sh("ip", "link", "set", outside, "master", bridge, "up")
            inside = ("ip", "-n", space)
            _sh(*inside, "link", "set", "lo", "up")
            _sh(*inside, "address", "add", f"10.77.0.{node + 1}/24", "dev", INTERFACE)
            _sh(*inside, "link", "set", INTERFACE, "mtu", str(MTU), "up")
            for side in ("wmem", "rmem"):
                setting = f"net.ipv4.tcp_{side}=4096 {SOCKET_BYTES // 2} {SOCKET_BYTES}"
                _sh("ip", "netns", "exec", space, "sysctl", "-q", "-w", setting)
            _sh("ip", "netns", "exec", space, "sysctl", "-q", "-w", "net.ipv4.tcp_slow_start_after_idle=0")
        self.set_rate(self.megabits)

    def set_rate(self, megabits: float) -> None:
        """Change the rate of all links."""
        self.megabits = megabits
        for node in range(self.nodes):
            tc = ("tc", "-n", self.name(node), "qdisc")
            subprocess.run([*tc, "del", "dev", INTERFACE, "root"], capture_output=True, check=False)
            if megabits:
                burst = max(2 * 65536, int(megabits * 1e6 / 8 * BURST_SECONDS))
                rate = ("rate", f"{megabits * 1e6:.0f}bit", "burst", str(burst), "latency", "50ms")
                _sh(*tc, "add", "dev", INTERFACE, "root", "handle", "1:", "tbf", *rate)

    def bytes_sent(self) -> list[int]:
        """What each node has sent over its link since it was made, in bytes on the wire."""
        counter = f"/sys/class/net/{INTERFACE}/statistics/tx_bytes"
        return [int(_sh("ip", "netns", "exec", self.name(n), "cat", counter)) for n in range(self.nodes)]

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
                inside = ["ip", "netns", "exec", self.name(rank // ranks_per_node), *command]
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

    def _remove(self) -> None:
        for command in reversed(self._made):
            subprocess.run(command, capture_output=True, check=False)
        self._made.clear()


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


def check_tools() -> None:
    """Raise NetworkError unless this process may make network namespaces."""
    if os.geteuid() != 0:
        raise NetworkError("the slow network needs root (network namespaces and tc): start the script with sudo")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise NetworkError(f"the slow network needs the tool {tool!r}: apt-get install iproute2")


def _sh(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NetworkError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
