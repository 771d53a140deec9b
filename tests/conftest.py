"""Two pytest workers at once (launch/test.sh): what may not be disturbed runs alone, and long files come first.

A test file stays with one worker, so that what its fixtures started serves all of its tests. A test marked `alone`,
because it waits for seconds that somebody set, begins when the other worker is between two tests and keeps it there.
In one process, without workers, none of this happens.
"""

from __future__ import annotations

import fcntl
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """First files with slow tests, then the others: a worker that is done early has then missed little."""
    if _lock(config) is not None:
        slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
        items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Around all of a test, its fixtures too; outside of its timeout, which does not count what it waits here."""
    lock = _lock(item.config)
    with nullcontext() if lock is None else _turn(lock, item.get_closest_marker("alone") is not None):
        return (yield)


def _lock(config: pytest.Config) -> Path | None:
    """The file over which the workers of this run agree, beside their temporary folders; None without workers."""
    return Path(config.option.basetemp).with_name("lock") if hasattr(config, "workerinput") else None


@contextmanager
def _turn(lock: Path, alone: bool) -> Iterator[None]:
    """Beside others, or alone. Whoever waits to be alone is not overtaken: all pass the same gate, one by one."""
    with open(lock, "w") as running, open(f"{lock}.gate", "w") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(running, fcntl.LOCK_UN)  # not only closed: a process that a test has forked holds it as well
