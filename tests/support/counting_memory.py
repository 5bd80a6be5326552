"""A state memory that only counts, for scheduler tests."""

from __future__ import annotations


class CountingMemory:
    """Room for ``capacity`` requests and ``capacity_tokens`` tokens. Fails the test when a request
    reserves twice or returns what it does not hold."""

    def __init__(self, capacity: int, capacity_tokens: int = 1 << 30) -> None:
        self.capacity = capacity
        self.capacity_tokens = capacity_tokens
        self.held: dict[str, int] = {}

    def reserve(self, request_id: str, num_tokens: int) -> bool:
        assert request_id not in self.held
        if len(self.held) == self.capacity:
            return False
        if sum(self.held.values()) + num_tokens > self.capacity_tokens:
            return False
        self.held[request_id] = num_tokens
        return True

    def release(self, request_id: str) -> None:
        del self.held[request_id]
