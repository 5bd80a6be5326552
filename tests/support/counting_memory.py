"""A state memory that only counts, for scheduler tests."""

from __future__ import annotations

from collections.abc import Collection

from stateferry.core.request import GenerationRequest


class CountingMemory:
    """Room for ``capacity`` requests and ``capacity_tokens`` tokens. Fails the test when a request
    reserves twice or returns what it does not hold."""

    def __init__(self, capacity: int, capacity_tokens: int = 1 << 30) -> None:
        self.capacity = capacity
        self.capacity_tokens = capacity_tokens
        self.held: dict[str, int] = {}
        self.spoilt: set[str] = set()
        # By request: what decode steps have consumed.
        self.tokens: dict[str, list[int]] = {}
        # By request: how much of its prompt is known beforehand.
        self.known: dict[str, int] = {}
        self.parked: set[str] = set()

    def resume(self, request: GenerationRequest, num_tokens: int) -> int | None:
        if not self.reserve(request.request_id, num_tokens):
            return None
        self.parked.discard(request.request_id)
        return self.known.get(request.request_id, 0)

    def consumed(self, request_id: str, token_id: int) -> None:
        assert request_id in self.held
        self.tokens.setdefault(request_id, []).append(token_id)

    def spoil(self, request_id: str) -> None:
        assert request_id in self.held
        self.spoilt.add(request_id)

    def reserve(self, request_id: str, num_tokens: int) -> bool:
        assert request_id not in self.held
        if len(self.held) == self.capacity:
            return False
        if sum(self.held.values()) + num_tokens > self.capacity_tokens:
            return False
        self.held[request_id] = num_tokens
        return True

    def park(self, request_id: str) -> None:
        self.release(request_id)
        self.parked.add(request_id)

    def forget(self, request_id: str) -> None:
        self.parked.remove(request_id)

    def publish(self, request_id: str) -> None:
        assert request_id in self.held

    def fits_without(self, num_tokens: int, request_ids: Collection[str]) -> bool:
        left = [tokens for name, tokens in self.held.items() if name not in request_ids]
        return len(left) < self.capacity and sum(left) + num_tokens <= self.capacity_tokens

    def release(self, request_id: str) -> None:
        del self.held[request_id]
