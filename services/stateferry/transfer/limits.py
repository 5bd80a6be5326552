"""Limits of the hand-off, for both sides."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from stateferry.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TransferLimits:
    """All are upper bounds and must be positive.

    ``staging_bytes`` is per sender and per receiver object; ``max_queued_pushes`` per receiver that
    is pushed to. ``progress_timeout_s`` bounds one message, ``credit_timeout_s`` the wait for
    staging, ``push_timeout_s`` a whole push with all its waiting.
    """

    max_handoff_bytes: int = 1 << 30
    staging_bytes: int = 256 << 20
    max_connections: int = 256
    max_expectations: int = 4096
    max_queued_pushes: int = 64
    connect_timeout_s: float = 1.0
    handshake_timeout_s: float = 2.0
    progress_timeout_s: float = 5.0
    credit_timeout_s: float = 10.0
    push_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ConfigError(f"transfer.{field.name}", "must be positive")
