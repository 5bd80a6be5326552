"""Names of workers, their lives, and requests."""

from __future__ import annotations

import enum
import re
import secrets
import time
from dataclasses import dataclass

REQUEST_ID_MAX_CHARS = 128
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")


class Role(enum.Enum):
    """What a worker does."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class WorkerKey:
    """One life of one worker: messages of an earlier incarnation are refused.

    ``worker_id`` is stable over restarts (``decode-0``); ``incarnation`` grows with each start.
    """

    worker_id: str
    incarnation: int

    def __str__(self) -> str:
        return f"{self.worker_id}@{self.incarnation:x}"


def new_incarnation() -> int:
    """A 63-bit number that grows with wall-clock time; low bits are random.

    42 bits of milliseconds keep later lives larger; 21 random bits keep two lives that start in
    the same millisecond apart.
    """
    return (int(time.time() * 1000) & ((1 << 42) - 1)) << 21 | secrets.randbits(21)


def new_request_id() -> str:
    """An unguessable request id, minted where the client sent none."""
    return f"req-{secrets.token_hex(12)}"


def is_request_id(text: str) -> bool:
    """Whether ``text`` may serve as a request id: 1 to 128 of ``[A-Za-z0-9._:-]``."""
    return _REQUEST_ID.fullmatch(text) is not None
