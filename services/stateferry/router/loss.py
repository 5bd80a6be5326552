"""Turns the loss of a worker into an error of every request that it holds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from stateferry.core.errors import WorkerLost
from stateferry.core.ids import WorkerKey

# Losses remembered for requests that were placed just before and begin to watch just after.
_MAX_REMEMBERED = 1024


class LossBoard:
    """Requests watch their workers here; whoever learns of a loss announces it."""

    def __init__(self) -> None:
        self._watchers: dict[WorkerKey, set[asyncio.Future[str]]] = {}
        self._lost: dict[WorkerKey, str] = {}

    def announce(self, key: WorkerKey, reason: str) -> None:
        """Fail every watch on this life of the worker, and those still to come."""
        problem = f"worker {key} is lost: {reason}"
        self._lost[key] = problem
        if len(self._lost) > _MAX_REMEMBERED:
            del self._lost[next(iter(self._lost))]
        for future in self._watchers.get(key, ()):
            if not future.done():
                future.set_result(problem)

    def restore(self, key: WorkerKey) -> None:
        """The same life is back: new requests may count on it again."""
        self._lost.pop(key, None)

    def is_watched(self, key: WorkerKey) -> bool:
        """Whether any request would be hurt by a loss."""
        return key in self._watchers

    async def watch(self, keys: Sequence[WorkerKey]) -> None:
        """Wait for ever, or until one of these workers is lost: then raises WorkerLost."""
        for key in keys:
            if key in self._lost:
                raise WorkerLost(self._lost[key])
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        for key in keys:
            self._watchers.setdefault(key, set()).add(future)
        try:
            problem = await future
        finally:
            for key in keys:
                self._drop(key, future)
        raise WorkerLost(problem)

    def _drop(self, key: WorkerKey, future: asyncio.Future[str]) -> None:
        futures = self._watchers[key]
        futures.discard(future)
        if not futures:
            del self._watchers[key]
