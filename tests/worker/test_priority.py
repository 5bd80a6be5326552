"""Threads that compute stand back; the others do not."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from stateferry.worker.priority import stand_back


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def niceness_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as inner:
        return inner.submit(niceness).result()


@pytest.mark.parametrize(("added", "seen"), [(0, 0), (3, 3), (30, 19)])
def test_a_thread_and_those_that_it_starts(added: int, seen: int) -> None:
    before = niceness()
    with ThreadPoolExecutor(1, initializer=stand_back, initargs=(added,)) as pool:
        assert pool.submit(niceness).result() == min(19, before + seen)
        assert pool.submit(niceness_of_a_new_thread).result() == min(19, before + seen)
    assert niceness() == before
    assert niceness_of_a_new_thread() == before
