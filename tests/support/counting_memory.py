"""A state memory that only counts, for scheduler tests."""

from __future__ import annotations


class CountingMemory:
    """Fails the test when a request reserves twice or returns what it does not hold."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: set[str] = set()

    def reserve(self, request_id: str) -> bool:
        assert request_id not in self.held
        if len(self.held) == self.capacity:
            return False
        self.held.add(request_id)
        return True

    def release(self, request_id: str) -> None:
        self.held.remove(request_id)
