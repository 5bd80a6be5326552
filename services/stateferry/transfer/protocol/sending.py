"""The sending machine of one part: what an answer means, and what may become of its staging.

::

    OFFERED -> credit -> CREDITED -> all bytes sent -> SENT -> seal -> SEALED
            -> reject -> REFUSED                             -> fail -> REFUSED
"""

from __future__ import annotations

import enum

from stateferry.core.errors import FrameError, InvariantViolation


class Answer(enum.Enum):
    """What a receiver may say to an offered part."""

    WAIT = "wait"
    CREDIT = "credit"
    REJECT = "reject"
    SEALED = "sealed"
    FAILED = "failed"


class SendPhase(enum.Enum):
    OFFERED = "offered"
    CREDITED = "credited"
    SENT = "sent"
    SEALED = "sealed"
    REFUSED = "refused"


_NEXT = {
    (SendPhase.OFFERED, Answer.WAIT): SendPhase.OFFERED,
    (SendPhase.OFFERED, Answer.CREDIT): SendPhase.CREDITED,
    (SendPhase.OFFERED, Answer.REJECT): SendPhase.REFUSED,
    (SendPhase.SENT, Answer.SEALED): SendPhase.SEALED,
    (SendPhase.SENT, Answer.FAILED): SendPhase.REFUSED,
}


class PartOffer:
    """One part, from the moment it is offered, as push number ``sequence`` of its connection."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        self.phase = SendPhase.OFFERED

    def answered(self, sequence: int, answer: Answer) -> SendPhase:
        """The phase that ``answer`` to push ``sequence`` leads to. Raises FrameError for one that
        is not due: the connection is then in an unknown phase and must be broken."""
        if sequence != self.sequence:
            raise FrameError(f"an answer to push {sequence}, not {self.sequence}")
        phase = _NEXT.get((self.phase, answer))
        if phase is None:
            raise FrameError(f"a {answer.name} to a part that is {self.phase.value}")
        self.phase = phase
        return phase

    def sent(self) -> None:
        """The transport has let go of every byte: only now may an answer end this part, or staging
        would be reused that a transfer still reads."""
        if self.phase is not SendPhase.CREDITED:
            raise InvariantViolation(f"bytes were sent of a part that is {self.phase.value}")
        self.phase = SendPhase.SENT

    @property
    def peer_may_read(self) -> bool:
        """Whether the peer may still be reading the staging. Should the connection break now, that
        memory is not to be reused."""
        return self.phase in (SendPhase.CREDITED, SendPhase.SENT)
