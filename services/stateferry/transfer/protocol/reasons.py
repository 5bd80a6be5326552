"""Why a push is not honoured."""

from __future__ import annotations

import enum


class RejectReason(enum.Enum):
    """``value`` is for people, the position for the wire: append only."""

    UNEXPECTED = "nobody reserved room for it"
    WRONG_EPOCH = "room was reserved for another attempt"
    WRONG_SENDER = "room was reserved for another sender"
    WRONG_RECEIVER = "it is meant for another worker or incarnation"
    DUPLICATE = "it has arrived, or is arriving, already"
    CLOSED = "its reservation was cancelled or has failed"
    OVERSIZE = "it is larger than the room reserved"
    OVERLOADED = "no staging became free in time"
    INTEGRITY = "a segment differs from its checksum"
    OUT_OF_ORDER = "a part before it is missing"
    WHOLE_ONLY = "it comes in parts, and room was reserved for one piece"
