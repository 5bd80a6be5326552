"""Counts a worker's reports."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Protocol

from stateferry.cache.state_cache import StateCache
from stateferry.core.worker import WorkerLoad


class Queue(Protocol):
    """The part of a scheduler that says how busy it is."""

    @property
    def num_active(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    @property
    def queued_tokens(self) -> int: ...


def load_reporter(queue: Queue, cache: StateCache) -> Callable[[], WorkerLoad]:
    """A function that gives the worker's load now, with the next sequence number."""
    sequence = itertools.count(1)

    def report() -> WorkerLoad:
        return WorkerLoad(
            sequence=next(sequence),
            active_requests=queue.num_active,
            queued_requests=queue.num_waiting,
            queued_tokens=queue.queued_tokens,
            state_slots=cache.state_slots,
            tail_pages=cache.tail_pages,
        )

    return report
