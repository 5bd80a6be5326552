"""Steps that were launched and are not over, and requests that must outlive them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Set
from typing import Generic, TypeVar

from stateferry.core.errors import InvariantViolation

StepT = TypeVar("StepT")


class InFlight(Generic[StepT]):
    """At most ``most`` steps, that end in the order in which they began. A request that is let go
    keeps its memory until no step can touch it."""

    def __init__(self, most: int, release: Callable[[str], None]) -> None:
        self._most = most
        self._release = release
        self._steps: deque[tuple[StepT, frozenset[str]]] = deque()
        self._leaving: set[str] = set()

    @property
    def is_full(self) -> bool:
        return len(self._steps) == self._most

    @property
    def steps(self) -> tuple[StepT, ...]:
        """The oldest first."""
        return tuple(step for step, _ in self._steps)

    @property
    def num_leaving(self) -> int:
        return len(self._leaving)

    @property
    def leaving(self) -> Set[str]:
        """Requests that were let go, and have their memory yet."""
        return self._leaving

    def is_leaving(self, request_id: str) -> bool:
        """Whether the request was let go, and still has its memory."""
        return request_id in self._leaving

    def launch(self, step: StepT, request_ids: Iterable[str]) -> None:
        """The step begins, and touches these requests."""
        if self.is_full:
            raise InvariantViolation(f"{self._most} steps are in flight already")
        self._steps.append((step, frozenset(request_ids)))

    def land(self, step: StepT) -> frozenset[str]:
        """The oldest step is over. Returns those of its requests that were let go, some of which
        give their memory back now. Raises InvariantViolation for any other step."""
        if not self._steps or self._steps[0][0] is not step:
            raise InvariantViolation("a step ended that was not the oldest in flight")
        _, touched = self._steps.popleft()
        leaving = touched & self._leaving
        for request_id in leaving:
            if not self._touches(request_id):
                self._leaving.remove(request_id)
                self._release(request_id)
        return leaving

    def let_go(self, request_id: str) -> None:
        """Give the request's memory back as soon as no step touches it."""
        if self._touches(request_id):
            self._leaving.add(request_id)
        else:
            self._release(request_id)

    def _touches(self, request_id: str) -> bool:
        return any(request_id in touched for _, touched in self._steps)
