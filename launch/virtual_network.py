"""Many nodes on one machine: each is a Linux network namespace with its own address, behind a link of its own.

    with VirtualNetwork(nodes=4, megabits=800) as network:
        subprocess.Popen(network.command(1, ["python", "worker.py"]))

A node has a host name (node0, node1, …, which all nodes can resolve), a loopback, and one interface, `link0`: a veth
whose other end is a port of a common bridge. There is no way out: no internet, no name server. What leaves a node is
shaped by a token bucket (`tc … tbf`) to the given rate, first come first served, so a link is full duplex like a real
one. Files are shared.

Needs Linux, root and the tools `ip` and `tc` (Debian: iproute2). Names carry the process id. Everything is removed at
the end, with the processes that still run in a node; what a killed process left behind is removed by the next one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import string
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

INTERFACE = "link0"
BURST_SECONDS = 1e-3  # how much tbf lets through at once: what a timer tick of the kernel needs
MTU = 9000
SETTINGS = Path("/etc/netns")  # `ip netns exec NAME` shows /etc/netns/NAME/hosts as /etc/hosts


class NetworkError(RuntimeError):
    """The network cannot be made here; the message says why and what helps."""


def why_not() -> str | None:
    """Why this process cannot make a network; None if it can."""
    if sys.platform != "linux":
        return f"virtual nodes are Linux network namespaces; this is {sys.platform}"
    if os.geteuid() != 0:
        return "virtual nodes need root (network namespaces): start it with sudo"
    missing = [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"virtual nodes need {' and '.join(missing)}: apt-get install iproute2 util-linux"
    return None


@dataclass
class VirtualNetwork:
    """`nodes` namespaces, each behind a link of `megabits` per second and direction (0: not limited).

    socket_bytes   upper limit of TCP's send and receive buffers; None: the system's. A limited link in front of
                   large buffers hides its slowness in them.
    """

    nodes: int
    megabits: float = 0
    socket_bytes: int | None = None
    _mark: str = ""  # what the names of all parts begin with
    _undo: list[list[str]] = field(default_factory=list)  # commands that take back what was done

    def __enter__(self) -> Self:
        if (problem := why_not()) is not None:
            raise NetworkError(problem)
        if not 1 <= self.nodes <= 250:
            raise NetworkError(f"{self.nodes} virtual nodes: choose 1 to 250")
        remove_left_behind()
        self._mark = _free_mark()
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._remove()

    def name(self, node: int) -> str:
        """Of the namespace."""
        return f"{self._mark}n{node}"

    def hostname(self, node: int) -> str:
        return f"node{node}"

    def address(self, node: int) -> str:
        return f"10.77.0.{node + 1}"

    def command(self, node: int, words: Sequence[str]) -> list[str]:
        """The command line that runs `words` in a node. The process that it starts becomes theirs (exec)."""
        named = ["unshare", "--uts", "sh", "-c", 'echo "$0" >/proc/sys/kernel/hostname && exec "$@"']
        return ["ip", "netns", "exec", self.name(node), *named, self.hostname(node), *words]

    def processes(self, node: int) -> list[int]:
        return _processes(self.name(node))

    def kill(self, node: int) -> None:
        """SIGKILL to all processes in a node, as if it lost its power and its peers' packets were refused."""
        _kill_all(self.name(node))

    def plug(self, node: int, *, connected: bool) -> None:
        """Pull a node's cable, or put it back: without it packets vanish, nothing is refused."""
        _sh("ip", "link", "set", self._port(node), "up" if connected else "down")

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

    def _port(self, node: int) -> str:
        return f"{self._mark}v{node}"

    def _build(self) -> None:
        bridge = f"{self._mark}b"
        self._undo.append(["ip", "link", "del", bridge])
        _sh("ip", "link", "add", bridge, "type", "bridge")
        _sh("ip", "link", "set", bridge, "mtu", str(MTU), "up")
        for node in range(self.nodes):
            self._add_node(node, bridge)
        self.set_rate(self.megabits)

    def _add_node(self, node: int, bridge: str) -> None:
        name, port = self.name(node), self._port(node)
        self._undo.append(["ip", "netns", "del", name])
        _sh("ip", "netns", "add", name)
        self._write_settings(name)
        self._undo.append(["ip", "link", "del", port])  # at once; the namespace's end goes with it
        ends = ("type", "veth", "peer", "name", INTERFACE, "netns", name)
        _sh("ip", "link", "add", port, "mtu", str(MTU), *ends)
        _sh("ip", "link", "set", port, "master", bridge, "up")
        _sh("ip", "-n", name, "link", "set", "lo", "up")
        _sh("ip", "-n", name, "address", "add", f"{self.address(node)}/24", "dev", INTERFACE)
        _sh("ip", "-n", name, "link", "set", INTERFACE, "mtu", str(MTU), "up")
        if self.socket_bytes is not None:
            for side in ("wmem", "rmem"):
                sizes = f"net.ipv4.tcp_{side}=4096 {self.socket_bytes // 2} {self.socket_bytes}"
                _sh("ip", "netns", "exec", name, "sysctl", "-q", "-w", sizes)
        _sh("ip", "netns", "exec", name, "sysctl", "-q", "-w", "net.ipv4.tcp_slow_start_after_idle=0")

    def _write_settings(self, name: str) -> None:
        folder = SETTINGS / name
        self._undo.append(["rm", "-rf", str(folder)])
        folder.mkdir(parents=True)
        hosts = [f"{self.address(n)} {self.hostname(n)}" for n in range(self.nodes)]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
        (folder / "resolv.conf").write_text("")  # no name server to wait for

    def _remove(self) -> None:
        for node in range(self.nodes):
            _kill_all(self.name(node))
        for command in reversed(self._undo):
            subprocess.run(command, capture_output=True, check=False)
        self._undo.clear()


def remove_left_behind() -> None:
    """Remove the networks of processes that are gone."""
    pattern = re.compile(r"\b(vn(\d+)[a-z](?:n\d+|b|v\d+))\b")
    for kind, delete in (("netns", ("netns", "del")), ("link", ("link", "del"))):
        for name, pid in dict(pattern.findall(_sh("ip", "-o", kind, "list"))).items():
            if not Path(f"/proc/{pid}").exists():
                if kind == "netns":
                    _kill_all(name)
                    shutil.rmtree(SETTINGS / name, ignore_errors=True)
                subprocess.run(["ip", *delete, name], capture_output=True, check=False)


def _free_mark() -> str:
    """This process may have several networks."""
    marks = [f"vn{os.getpid()}{letter}" for letter in string.ascii_lowercase]
    taken = _sh("ip", "-o", "link", "list")
    for mark in marks:
        if f"{mark}b" not in taken:
            return mark
    raise NetworkError(f"this process has {len(marks)} virtual networks already")


def _processes(namespace: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    return [int(pid) for pid in done.stdout.split()]


def _kill_all(namespace: str) -> None:
    """Until none is left: what is killed may just have started another one."""
    while pids := _processes(namespace):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _sh(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NetworkError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
