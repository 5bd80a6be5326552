"""A pass that was planned: what starts it, and what came of it.

On a CPU a pass is over when its start returns. On a GPU a start only queues the work; a pass behind
it can be queued as well before anybody waits for the first one's tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from stateferry.core.sampling import SampledToken

# One entry per row that samples, in order; None where its logits are not finite or its rules broke.
Sampled = list[SampledToken | None]


class Started(Protocol):
    """A pass that has been started."""

    @property
    def is_over(self) -> bool:
        """Whether ``sampled`` returns at once."""

    def sampled(self) -> Sampled:
        """Waits for the end of the pass; on any thread, any number of times. Raises what the pass
        failed with."""


@dataclass(frozen=True, slots=True)
class Over:
    """A pass that ended within its start."""

    tokens: Sampled
    is_over = True

    def sampled(self) -> Sampled:
        return self.tokens


@dataclass(frozen=True, slots=True)
class Launch:
    """``start`` touches the pools and no lease: on one thread, in the order of planning. What is
    started behind it may use what it writes."""

    start: Callable[[], Started]

    def __call__(self) -> Sampled:
        """Start, and wait for the end."""
        return self.start().sampled()

    def behind(self, work: Callable[[], None]) -> Launch:
        """The same, with ``work`` done first."""

        def start() -> Started:
            work()
            return self.start()

        return Launch(start)
