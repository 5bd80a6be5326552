"""The receiving machine: which parts of which attempts may land, and when an attempt is sealed.

::

    reserve -> WAITING -> claim -> RECEIVING -> land, not the last part -> WAITING
                                             -> land, the last part     -> SEALED
               any phase -> close -> CLOSED
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from dataclasses import dataclass

from stateferry.core.errors import InvariantViolation, Overloaded, Refused
from stateferry.core.ids import WorkerKey
from stateferry.transfer.protocol.reasons import RejectReason

_REMEMBERED_CLOSED = 16384


class Phase(enum.Enum):
    WAITING = "waiting"
    RECEIVING = "receiving"
    SEALED = "sealed"
    CLOSED = "closed"


class Landing(enum.Enum):
    """What to do with a part that has arrived and whose checksums held."""

    KEEP = "more parts follow"
    SEAL = "it was the last one"
    DROP = "nobody wants it any more"


@dataclass(frozen=True, slots=True)
class ExpectedPush:
    """The one hand-off that is allowed; ``max_bytes`` bounds the segments of all its parts.

    ``in_parts``: it may come in several; otherwise in one.
    """

    request_id: str
    epoch: int
    sender: WorkerKey
    max_bytes: int
    in_parts: bool = False

    @property
    def attempt(self) -> tuple[str, int]:
        return self.request_id, self.epoch


@dataclass(frozen=True, slots=True)
class PartHeader:
    """What a part says about itself; ``number`` counts an attempt's parts from 0."""

    request_id: str
    epoch: int
    sender: WorkerKey
    receiver: WorkerKey
    number: int
    is_last: bool
    size_bytes: int


class Attempt:
    """One reservation. Changed by its book only."""

    def __init__(self, push: ExpectedPush) -> None:
        self.push = push
        self.phase = Phase.WAITING
        self.num_landed = 0
        self.landed_bytes = 0
        self.arriving: PartHeader | None = None

    @property
    def is_over(self) -> bool:
        return self.phase in (Phase.SEALED, Phase.CLOSED)


class AttemptBook:
    """All open attempts, and a bounded memory of those that have ended."""

    def __init__(self, me: WorkerKey, max_open: int) -> None:
        self._me = me
        self._max_open = max_open
        self._open: dict[tuple[str, int], Attempt] = {}
        self._ended: OrderedDict[tuple[str, int], RejectReason] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def reserve(self, push: ExpectedPush) -> Attempt:
        """Raises Overloaded when there are too many, Refused for an attempt used before."""
        if push.attempt in self._open or push.attempt in self._ended:
            raise Refused(f"request {push.request_id}, epoch {push.epoch} was expected before")
        if len(self._open) >= self._max_open:
            raise Overloaded(f"{self._max_open} hand-offs are expected already")
        attempt = self._open[push.attempt] = Attempt(push)
        return attempt

    def claim(self, part: PartHeader, sender: WorkerKey) -> Attempt | RejectReason:
        """The attempt that this part of ``sender`` belongs to, now receiving; or why not."""
        if part.receiver != self._me:
            return RejectReason.WRONG_RECEIVER
        attempt = self._open.get((part.request_id, part.epoch))
        if attempt is None:
            ended = self._ended.get((part.request_id, part.epoch))
            return ended or self._no_such(part.request_id)
        reason = _why_not(attempt, part, sender)
        if reason is not None:
            return reason
        attempt.phase, attempt.arriving = Phase.RECEIVING, part
        return attempt

    def postpone(self, attempt: Attempt) -> None:
        """The claimed part was turned away for lack of staging; it may come again."""
        if attempt.phase is Phase.RECEIVING:
            attempt.phase, attempt.arriving = Phase.WAITING, None

    def land(self, attempt: Attempt) -> Landing:
        """The claimed part is here, every checksum held."""
        if attempt.phase is not Phase.RECEIVING:
            return Landing.DROP
        part, attempt.arriving = attempt.arriving, None
        if part is None:
            raise InvariantViolation("a part landed that was not claimed")
        attempt.num_landed += 1
        attempt.landed_bytes += part.size_bytes
        if not part.is_last:
            attempt.phase = Phase.WAITING
            return Landing.KEEP
        self._end(attempt, Phase.SEALED, RejectReason.DUPLICATE)
        return Landing.SEAL

    def close(self, attempt: Attempt) -> bool:
        """Cancelled, broken off or wrong bytes; False when it had ended before."""
        if attempt.is_over:
            return False
        self._end(attempt, Phase.CLOSED, RejectReason.CLOSED)
        return True

    def _end(self, attempt: Attempt, phase: Phase, late_parts: RejectReason) -> None:
        attempt.phase = phase
        del self._open[attempt.push.attempt]
        self._ended[attempt.push.attempt] = late_parts
        if len(self._ended) > _REMEMBERED_CLOSED:
            self._ended.popitem(last=False)

    def _no_such(self, request_id: str) -> RejectReason:
        if any(request == request_id for request, _ in self._open):
            return RejectReason.WRONG_EPOCH
        return RejectReason.UNEXPECTED


def _why_not(attempt: Attempt, part: PartHeader, sender: WorkerKey) -> RejectReason | None:
    push = attempt.push
    if sender != push.sender or sender != part.sender:
        return RejectReason.WRONG_SENDER
    if attempt.phase is not Phase.WAITING or part.number < attempt.num_landed:
        return RejectReason.DUPLICATE
    if not push.in_parts and not part.is_last:
        return RejectReason.WHOLE_ONLY
    if part.number > attempt.num_landed:
        return RejectReason.OUT_OF_ORDER
    if attempt.landed_bytes + part.size_bytes > push.max_bytes:
        return RejectReason.OVERSIZE
    return None
