"""Several nodes, each a network namespace with a real torchrun agent: the loss of one, and a signal to one.

Skipped where namespaces cannot be made (Linux and root only); CI runs as root.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.virtual_cluster import VirtualCluster
from launch.virtual_network import NetworkError, VirtualNetwork, why_not
from tests.job import MODEL, ROOT, SIZE, checkpoints, losses, steps_done, write_text

STEPS = 30
LOOP = f"steps={STEPS} save_every=5 eval_every=10 sample_tokens=0 logger=none"
LAYOUT = "parallel.pp=4 model.num_layers=4 schedule.micro_batches=8"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "RDZV_CONF": "keep_alive_interval=2,keep_alive_max_attempt=5"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]


@pytest.fixture(scope="module")
def network() -> Iterator[VirtualNetwork]:
    with VirtualNetwork(nodes=2) as made:
        yield made


def cluster(network: VirtualNetwork, folder: Path, run: str, **environment: str) -> VirtualCluster:
    places = f"run={run} runs_dir={folder} data.path={folder / 'text'} data.cache_dir={folder / 'cache'}"
    overrides = f"{MODEL} {SIZE} {places} {LOOP} {LAYOUT}".split()
    return VirtualCluster(network, 2, overrides, {**ENVIRONMENT, **environment})


@pytest.fixture(scope="module")
def folder(network: VirtualNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a little text, and the undisturbed run in `whole`."""
    made = tmp_path_factory.mktemp("cluster")
    write_text(made)
    with cluster(network, made, "whole") as whole:
        whole.start_all()
        assert whole.wait(180) == {0: 0, 1: 0}, whole.output(0) + whole.output(1)
    assert len(losses(made / "whole")["train/loss"]) == STEPS
    return made


def wait_until(running: VirtualCluster, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not happened():
        assert time.monotonic() < deadline, f"nothing happened:\n{running.output(0)}\n{running.output(1)}"
        time.sleep(0.02)


@pytest.mark.parametrize("node", [1, 0])
def test_a_lost_node_comes_back_and_the_run_goes_on_bit_for_bit(
    network: VirtualNetwork, folder: Path, node: int
) -> None:
    """Node 1's return finds the other agent waiting. With node 0 the rendezvous is lost, and both are started again."""
    run_dir = folder / f"lost_{node}"
    with cluster(network, folder, run_dir.name) as running:
        running.start_all()
        wait_until(running, lambda: steps_done(run_dir) >= 8 and checkpoints(run_dir) != [])
        running.lose(node)
        assert steps_done(run_dir) < STEPS, "it was lost too late to prove anything"
        if node == 0:
            wait_until(running, lambda: running.codes()[1] is not None)
            assert running.codes()[1] != 0
            running.start(1)
        running.start(node)
        codes = running.wait(600)
        said = running.output(0) + running.output(1)
    assert codes == {0: 0, 1: 0}, said
    assert losses(run_dir) == losses(folder / "whole")


def test_a_signal_to_one_agent_saves_and_stops_all_nodes(network: VirtualNetwork, folder: Path) -> None:
    run_dir = folder / "stopped"
    with cluster(network, folder, run_dir.name, EXIT_CODE_WHEN_STOPPED="75") as running:
        running.start_all()
        wait_until(running, lambda: steps_done(run_dir) >= 3)
        running.agents[1].send_signal(signal.SIGTERM)
        assert running.wait(60) == {0: 75, 1: 75}, running.output(0) + running.output(1)
        assert "received SIGUSR1" in running.output(0)
    assert checkpoints(run_dir)[-1] == f"step_{steps_done(run_dir):08d}"
    with cluster(network, folder, run_dir.name) as running:
        running.start_all()
        assert running.wait(180) == {0: 0, 1: 0}, running.output(0) + running.output(1)
    assert losses(run_dir) == losses(folder / "whole")


def test_links_are_as_slow_as_asked_and_only_those() -> None:
    """2 MB at 80 Mbit/s take at least 0.2 s less the bucket; the loopback of a node is not limited."""
    serve = "import socket; s=socket.create_server(('', 9)); c,_=s.accept()\nwhile c.recv(65536): pass\nc.sendall(b'!')"
    send = (
        "import socket,sys,time; c=socket.create_connection((sys.argv[1],9)); t=time.monotonic()\n"
        "c.sendall(bytes(2_000_000)); c.shutdown(1); c.recv(1); print(time.monotonic()-t)"
    )
    with VirtualNetwork(nodes=2, megabits=80) as network:
        for target, low in (("node1", 0.17), ("node0", 0.0)):
            node = int(target[-1])
            server = subprocess.Popen(network.command(node, [sys.executable, "-c", serve]))
            time.sleep(0.5)
            sent = subprocess.run(
                network.command(0, [sys.executable, "-c", send, target]), capture_output=True, text=True, check=True
            )
            assert float(sent.stdout) >= low
            server.wait(timeout=10)
        assert network.bytes_sent()[0] > 2_000_000 > network.bytes_sent()[1]


def test_nothing_is_left_behind_even_by_a_killed_script() -> None:
    script = (
        "import os, subprocess\nfrom launch.virtual_network import VirtualNetwork\n"
        "with VirtualNetwork(2) as network:\n"
        "    subprocess.Popen(network.command(1, ['sleep', '1000']))\n    print(os.getpid(), flush=True)\n    input()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    mark = f"vn{owner.stdout.readline().strip()}"
    assert mark in listed()
    owner.kill()
    owner.wait()
    assert mark in listed(), "if the kernel removed it, the test proves nothing"
    with VirtualNetwork(1):
        assert mark not in listed()
    assert not list(Path("/etc/netns").glob(f"{mark}*"))


def listed() -> str:
    both = [subprocess.run(["ip", kind, "list"], capture_output=True, text=True).stdout for kind in ("netns", "link")]
    return "".join(both)


def test_too_many_nodes() -> None:
    with pytest.raises(NetworkError, match="251 virtual nodes"), VirtualNetwork(251):
        pass
