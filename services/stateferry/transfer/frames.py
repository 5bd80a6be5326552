"""The messages of the hand-off protocol.

::

    sender                               receiver
    HELLO    who, to whom, fingerprint ->
             <- WELCOME | REFUSED        what differs
    PUSH     [MAC] manifest of a part  ->            one at a time per connection
             <- WAITING, repeated        there is no staging yet, but the receiver lives
             <- CREDIT | REJECT          staging is there, or why not
    DATA     raw bytes, in messages of DATA_MESSAGE_BYTES, the last one shorter
             <- SEALED | FAILED          every checksum held, or why not
    BYE                                ->

All but DATA are control messages: ``magic | type | 3 zeros | sequence | body_len | crc | body``,
with a CRC-32C over everything else. A receive must name its buffer before the size is known, so a
control message has at most CONTROL_MAX_BYTES. ``sequence`` counts a connection's pushes; an answer
repeats it. The layout of the header, HELLO and REFUSED never changes, so that two versions can
still tell each other that they differ.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from dataclasses import dataclass

import google_crc32c

from stateferry.core.errors import FrameError, Refused
from stateferry.core.fingerprint import Fingerprint
from stateferry.core.ids import WorkerKey
from stateferry.transfer.protocol.reasons import RejectReason as RejectReason
from stateferry.transfer.wire import TEXT_MAX_BYTES, BodyReader, BodyWriter

CONTROL_MAX_BYTES = 128 << 10
DATA_MESSAGE_BYTES = 16 << 20

_MAGIC = b"SFHO"
_HEADER = struct.Struct("<4sB3xIII")
HEADER_BYTES = _HEADER.size
_CRC = struct.Struct("<I")
_CRC_AT = HEADER_BYTES - _CRC.size


class FrameType(enum.Enum):
    HELLO = 1
    WELCOME = 2
    REFUSED = 3
    PUSH = 4
    CREDIT = 5
    REJECT = 6
    SEALED = 7
    FAILED = 8
    BYE = 9
    WAITING = 10


_REASONS = tuple(RejectReason)


class PushRejected(Refused):
    """The receiver answered, and the answer is no. The connection stays usable."""

    def __init__(self, reason: RejectReason) -> None:
        super().__init__(f"push rejected: {reason.value}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Frame:
    """A control message whose checksum held; ``body`` is not decoded yet."""

    type: FrameType
    sequence: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of a connection."""

    sender: WorkerKey
    receiver: WorkerKey
    fingerprint: Fingerprint


@dataclass(frozen=True, slots=True)
class RefusedHello:
    """``field`` differs; ``theirs`` is its value at the receiver, as text."""

    field: str
    theirs: str


def encode_frame(frame: Frame) -> bytes:
    """The bytes of a control message. Raises FrameError when it would be too long."""
    if HEADER_BYTES + len(frame.body) > CONTROL_MAX_BYTES:
        raise FrameError(f"a {frame.type.name} of {len(frame.body)} bytes")
    head = _HEADER.pack(_MAGIC, frame.type.value, frame.sequence, len(frame.body), 0)[:_CRC_AT]
    crc = google_crc32c.extend(google_crc32c.value(head), frame.body)
    return head + _CRC.pack(crc) + frame.body


def decode_frame(buffer: memoryview) -> Frame:
    """The control message at the start of ``buffer``, which may be longer than the message.

    Raises FrameError, without copying anything, for lengths that the buffer cannot hold.
    """
    if len(buffer) < HEADER_BYTES:
        raise FrameError("shorter than a header")
    magic, code, sequence, body_len, crc = _HEADER.unpack_from(buffer)
    if magic != _MAGIC:
        raise FrameError("not a message of this protocol")
    end = HEADER_BYTES + body_len
    if end > min(len(buffer), CONTROL_MAX_BYTES):
        raise FrameError(f"claims a body of {body_len} bytes")
    head, body = bytes(buffer[:_CRC_AT]), bytes(buffer[HEADER_BYTES:end])
    if google_crc32c.extend(google_crc32c.value(head), body) != crc:
        raise FrameError("the message differs from its checksum")
    try:
        return Frame(FrameType(code), sequence, body)
    except ValueError as error:
        raise FrameError(f"unknown message type {code}") from error


def encode_hello(hello: Hello) -> bytes:
    body = BodyWriter()
    body.worker(hello.sender)
    body.worker(hello.receiver)
    for field in dataclasses.fields(Fingerprint):
        body.text(str(getattr(hello.fingerprint, field.name)))
    return body.finish()


def decode_hello(body: bytes) -> Hello:
    """Raises FrameError."""
    reader = BodyReader(body)
    sender, receiver = reader.worker(), reader.worker()
    protocol, model, weights, layout, grid, *names = (
        reader.text() for _ in dataclasses.fields(Fingerprint)
    )
    reader.finish()
    try:
        fingerprint = Fingerprint(int(protocol), model, weights, layout, int(grid), *names)
    except ValueError as error:
        raise FrameError("the fingerprint is malformed") from error
    return Hello(sender, receiver, fingerprint)


def encode_refused(refused: RefusedHello) -> bytes:
    body = BodyWriter()
    body.text(refused.field)
    # Cut to the limit on bytes; what the cut leaves of a character is dropped.
    cut = refused.theirs.encode()[:TEXT_MAX_BYTES]
    body.text(cut.decode(errors="ignore"))
    return body.finish()


def decode_refused(body: bytes) -> RefusedHello:
    """Raises FrameError."""
    reader = BodyReader(body)
    refused = RefusedHello(reader.text(), reader.text())
    reader.finish()
    return refused


def encode_welcome(fingerprint: Fingerprint) -> bytes:
    """WELCOME repeats the fingerprint, as a digest: the sender checks too."""
    return fingerprint.digest()


def encode_reason(reason: RejectReason) -> bytes:
    return bytes([_REASONS.index(reason)])


def decode_reason(body: bytes) -> RejectReason:
    """Raises FrameError."""
    if len(body) != 1 or body[0] >= len(_REASONS):
        raise FrameError("unknown reason")
    return _REASONS[body[0]]
