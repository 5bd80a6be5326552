"""Whether a request whose attempt failed is tried again, when, and without whom.

A worker that is lost takes a state with it, never an answer: what the client has of the output is
behind the prompt from then on, another attempt runs that from the deepest state that is left of it,
and goes on with the next token. The bits are the same, so nobody can tell from the stream.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from stateferry.core.clock import Clock
from stateferry.core.errors import HandoffError, NoWorker, Overloaded, StateferryError, Unavailable
from stateferry.core.ids import WorkerKey

T = TypeVar("T")

_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 1.0
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class FailoverLimits:
    """``max_attempts`` of one request, the first included; so long may it wait in all for workers
    to come back."""

    max_attempts: int
    max_wait_s: float


class SecondChances:
    """Those of one request."""

    def __init__(self, limits: FailoverLimits, clock: Clock, deadline_s: float) -> None:
        self._limits = limits
        self._clock = clock
        self._deadline_s = deadline_s
        self._failed_s: float | None = None
        self.num_failed = 0
        # Workers that it should not meet again as long as there are others.
        self.avoided: frozenset[WorkerKey] = frozenset()

    def take(self, error: StateferryError, suspects: frozenset[WorkerKey]) -> bool:
        """Whether to try again after this error, for which these workers may be to blame."""
        self.num_failed += 1
        if not isinstance(error, Unavailable | HandoffError):
            # The request's own fault, a full queue, or a bug that another attempt would meet again.
            return False
        if self.num_failed >= self._limits.max_attempts:
            return False
        if self._failed_s is None:
            self._failed_s = self._clock.monotonic_s()
        self.avoided |= suspects
        return True

    async def pause(self) -> None:
        """Not at all the first time; then longer from one time to the next, and not all requests
        of a worker that is lost for as long as each other."""
        if self.num_failed > 1:
            most_s = min(_FIRST_PAUSE_S * 2**self.num_failed, _LONGEST_PAUSE_S)
            await asyncio.sleep(most_s * random.uniform(0.5, 1.0))

    async def seats(self, find: Callable[[], Awaitable[T]]) -> T:
        """What ``find`` gives; another attempt waits for workers that are gone to come back. Raises
        as ``find`` does."""
        while True:
            try:
                return await find()
            except (NoWorker, Overloaded):
                if self._failed_s is None or not self._may_wait(self._failed_s):
                    raise
                # Whoever is left is better than nobody.
                self.avoided = frozenset()
                await asyncio.sleep(_POLL_S)

    def _may_wait(self, failed_s: float) -> bool:
        now_s = self._clock.monotonic_s()
        return now_s < self._deadline_s and now_s - failed_s < self._limits.max_wait_s
