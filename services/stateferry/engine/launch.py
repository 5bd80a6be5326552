"""A pass that was planned: what starts it, and what came of it.

On a CPU a pass is over when its start returns. On a GPU a start only queues the work; a pass behind
it can be queued as well before anybody waits for the first one's tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from stateferry.core.sampling import SampledToken

ResultT = TypeVar("ResultT")
OtherT = TypeVar("OtherT")
Result_co = TypeVar("Result_co", covariant=True)

# One entry per row that samples, in order; None where its logits are not finite or its rules broke.
Sampled = list[SampledToken | None]


class Running(Protocol[Result_co]):
    """A pass that has been started."""

    @property
    def is_over(self) -> bool:
        """Whether ``sampled`` returns at once."""

    def sampled(self) -> Result_co:
        """Waits for the end of the pass; on any thread, any number of times. Raises what the pass
        failed with."""


@dataclass(frozen=True, slots=True)
class Over(Generic[ResultT]):
    """A pass that ended within its start."""

    tokens: ResultT
    is_over = True

    def sampled(self) -> ResultT:
        return self.tokens


@dataclass(frozen=True, slots=True)
class Planned(Generic[ResultT]):
    """``start`` touches the pools and no lease: on one thread, in the order of planning. What is
    started behind it may use what it writes."""

    start: Callable[[], Running[ResultT]]

    def __call__(self) -> ResultT:
        """Start, and wait for the end."""
        return self.start().sampled()

    def behind(self, work: Callable[[], None]) -> Planned[ResultT]:
        """The same, with ``work`` done first."""

        def start() -> Running[ResultT]:
            work()
            return self.start()

        return Planned(start)

    def then(self, made_of: Callable[[ResultT], OtherT]) -> Planned[OtherT]:
        """The same, with another result made of its own."""
        return Planned(lambda: _Made(self.start(), made_of))


@dataclass(frozen=True, slots=True)
class _Made(Generic[ResultT, OtherT]):
    running: Running[ResultT]
    made_of: Callable[[ResultT], OtherT]

    @property
    def is_over(self) -> bool:
        return self.running.is_over

    def sampled(self) -> OtherT:
        return self.made_of(self.running.sampled())


Started = Running[Sampled]
Launch = Planned[Sampled]
