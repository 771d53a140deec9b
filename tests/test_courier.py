"""The thread that starts messages: in order, what goes wrong is told, and nothing stays behind."""

from __future__ import annotations

import gc
import threading
import time

import pytest
import torch

from dualpipe.courier import Beside, Direct, courier_for


def test_calls_are_made_in_order_by_another_thread() -> None:
    courier, done, threads = Beside(), list[int](), set[int]()
    for number in range(500):
        courier.hand(lambda n: (done.append(n), threads.add(threading.get_ident())), number)
    courier.settle()
    assert done == list(range(500))
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    courier.stop()


def test_the_first_failure_is_raised_by_what_is_asked_next_and_the_rest_is_left_undone() -> None:
    courier, done = Beside(), list[int]()
    courier.hand(lambda: 1 / 0)
    courier.hand(done.append, 1)
    with pytest.raises(ZeroDivisionError):
        courier.settle()
    with pytest.raises(ZeroDivisionError):
        courier.hand(done.append, 2)
    assert done == []
    courier.stop()


def test_stop_drops_what_waits_and_raises_nothing() -> None:
    courier, done, begun, go = Beside(), list[int](), threading.Event(), threading.Event()
    courier.hand(lambda: (begun.set(), go.wait(10)))
    courier.hand(done.append, 1)
    begun.wait(10)
    stopper = threading.Thread(target=courier.stop)
    stopper.start()
    time.sleep(0.05)
    assert stopper.is_alive(), "it waits for the call under way"
    go.set()
    stopper.join(10)
    assert not stopper.is_alive()
    assert done == []
    Beside().stop()  # nothing was ever handed over


def test_the_thread_ends_with_its_courier() -> None:
    def threads() -> int:
        return sum(thread.name == "dualpipe messages" for thread in threading.enumerate())

    before = threads()
    courier = Beside()
    assert threads() == before, "none before the first call"
    courier.hand(lambda: None)
    courier.settle()
    assert threads() == before + 1
    del courier
    gc.collect()
    deadline = time.monotonic() + 10
    while threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == before


def test_only_a_cpu_needs_one() -> None:
    assert isinstance(courier_for(torch.device("cpu")), Beside)
    assert isinstance(courier_for(torch.device("cuda", 0)), Direct)
    with pytest.raises(ZeroDivisionError):
        Direct().hand(lambda: 1 / 0)
