"""What the router reports while it works; telemetry turns it into metrics."""

from __future__ import annotations

from typing import Protocol


class RouterObserver(Protocol):
    """Receives measurements. Every method is called on the event loop and must not block."""

    def request_started(self) -> None:
        """A call arrived; valid or not."""

    def request_finished(self, code: str, seconds: float) -> None:
        """A call ended. ``code`` is a gRPC status name (``OK``, ``UNAVAILABLE``, ...)."""

    def tokens(self, prompt: int, generated: int) -> None:
        """Tokens of one completed request."""

    def queued(self, seconds: float) -> None:
        """A request found its workers after this wait."""

    def first_token(self, seconds: float) -> None:
        """From a request's arrival to its first delta."""

    def inter_token(self, seconds: float) -> None:
        """Between two neighbouring tokens of one stream."""

    def handoff(self, transport: str, size_bytes: int, seconds: float) -> None:
        """A state went from a prefill to a decode worker."""

    def failed_over(self, cause: str) -> None:
        """An attempt failed of this kind of error, and another one follows."""

    def resumed(self, seconds: float) -> None:
        """A stream goes on behind a failure, so long after the token before it."""

    def occupancy(self, in_flight: int, waiting: int) -> None:
        """Requests inside the router, and those among them that wait for a worker."""

    def workers(self, role: str, count: int) -> None:
        """Live workers of a role."""


class NoObserver:
    """Ignores everything."""

    def request_started(self) -> None:
        return None

    def request_finished(self, code: str, seconds: float) -> None:
        return None

    def tokens(self, prompt: int, generated: int) -> None:
        return None

    def queued(self, seconds: float) -> None:
        return None

    def first_token(self, seconds: float) -> None:
        return None

    def inter_token(self, seconds: float) -> None:
        return None

    def handoff(self, transport: str, size_bytes: int, seconds: float) -> None:
        return None

    def failed_over(self, cause: str) -> None:
        return None

    def resumed(self, seconds: float) -> None:
        return None

    def occupancy(self, in_flight: int, waiting: int) -> None:
        return None

    def workers(self, role: str, count: int) -> None:
        return None
