"""Finds what is wrong in bytes that protobuf refused, so that an answer can name the field.

The parser only says "bad UTF-8" or "corrupt". Walking the wire format beside the message's
descriptor finds the place. Runs on refused or oversized input only; every loop is bounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from google.protobuf.descriptor import FieldDescriptor

WHOLE_MESSAGE = "request"
_MAX_FIELDS = 20_000
_MAX_DEPTH = 8
_MAX_VARINT_BYTES = 10
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BYTES_TYPES = frozenset(
    {FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_MESSAGE}
)
_FIXED64_TYPES = frozenset(
    {FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FIXED64, FieldDescriptor.TYPE_SFIXED64}
)
_FIXED32_TYPES = frozenset(
    {FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_FIXED32, FieldDescriptor.TYPE_SFIXED32}
)
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}
# The type stubs know two classes of descriptor, of which one is the C implementation's.
Descriptor = Any


@dataclass(frozen=True, slots=True)
class WireFault:
    """``field`` is a proto path (``stop.strings[0]``), or ``request`` when no field is to blame."""

    field: str
    problem: str


class _Field(NamedTuple):
    number: int
    wire_type: int
    start: int  # of the value
    end: int


class _Malformed(Exception):
    """``number`` is the field whose value is broken, 0 when not even its tag could be read."""

    def __init__(self, number: int, problem: str) -> None:
        super().__init__(problem)
        self.number = number
        self.problem = problem


def locate_fault(payload: bytes, descriptor: Descriptor) -> WireFault:
    """The first thing in ``payload`` that keeps it from being a ``descriptor`` message."""
    fault = _walk(payload, 0, len(payload), descriptor, "", 0)
    return fault or WireFault(WHOLE_MESSAGE, "is not a valid message")


def locate_unknown(payload: bytes, descriptor: Descriptor) -> WireFault:
    """The first field of a well-formed ``payload`` that ``descriptor`` does not know, or knows with
    a value of another type."""
    fault = _walk_unknown(payload, 0, len(payload), descriptor, "", 0)
    return fault or WireFault(WHOLE_MESSAGE, "holds unknown fields")


def largest_field(payload: bytes, descriptor: Descriptor) -> tuple[str, int]:
    """Path and size in bytes of the largest top-level field, without parsing its content."""
    name, largest = WHOLE_MESSAGE, 0
    position = 0
    try:
        for _ in range(_MAX_FIELDS):
            if position >= len(payload):
                break
            field = _next_field(payload, position, len(payload))
            position = field.end
            known = descriptor.fields_by_number.get(field.number)
            if known is not None and field.end - field.start > largest:
                name, largest = known.name, field.end - field.start
    except _Malformed:
        pass  # What was read so far names the culprit well enough.
    return name, largest or len(payload)


def _walk(
    payload: bytes, start: int, end: int, descriptor: Descriptor, prefix: str, depth: int
) -> WireFault | None:
    counts: dict[int, int] = {}
    position = start
    for _ in range(_MAX_FIELDS):
        if position >= end:
            return None
        try:
            field = _next_field(payload, position, end)
        except _Malformed as error:
            known = descriptor.fields_by_number.get(error.number)
            path = prefix + known.name if known is not None else prefix.rstrip(".")
            return WireFault(path or WHOLE_MESSAGE, error.problem)
        position = field.end
        known = descriptor.fields_by_number.get(field.number)
        if known is None:
            continue
        index = counts.get(field.number, 0)
        counts[field.number] = index + 1
        path = f"{prefix}{known.name}" + (f"[{index}]" if known.is_repeated else "")
        fault = _fault_in_value(payload, field, known, path, depth)
        if fault is not None:
            return fault
    return None


def _walk_unknown(
    payload: bytes, start: int, end: int, descriptor: Descriptor, prefix: str, depth: int
) -> WireFault | None:
    position = start
    for _ in range(_MAX_FIELDS):
        if position >= end:
            return None
        try:
            field = _next_field(payload, position, end)
        except _Malformed:
            # A group, say: legal on the wire, and nothing that we know.
            return WireFault(prefix.rstrip(".") or WHOLE_MESSAGE, "holds an unknown field")
        position = field.end
        known = descriptor.fields_by_number.get(field.number)
        if known is None:
            parent = prefix.rstrip(".") or WHOLE_MESSAGE
            return WireFault(parent, f"unknown field number {field.number}")
        path = prefix + known.name
        if field.wire_type not in _wire_types(known):
            return WireFault(path, "has a value of another type")
        if known.message_type is not None and depth < _MAX_DEPTH:
            inner = known.message_type
            fault = _walk_unknown(payload, field.start, field.end, inner, path + ".", depth + 1)
            if fault is not None:
                return fault
    return None


def _wire_types(known: FieldDescriptor) -> tuple[int, ...]:
    """How a field may be written; repeated numbers may also be packed."""
    if known.type in _BYTES_TYPES:
        return (_BYTES,)
    if known.type in _FIXED64_TYPES:
        own = _FIXED64
    elif known.type in _FIXED32_TYPES:
        own = _FIXED32
    else:
        own = _VARINT
    return (own, _BYTES) if known.is_repeated else (own,)


def _fault_in_value(
    payload: bytes, field: _Field, known: FieldDescriptor, path: str, depth: int
) -> WireFault | None:
    if field.wire_type != _BYTES:
        return None
    if known.type == FieldDescriptor.TYPE_STRING:
        try:
            str(memoryview(payload)[field.start : field.end], "utf-8")
        except UnicodeDecodeError:
            return WireFault(path, "is not UTF-8")
    elif known.message_type is not None and depth < _MAX_DEPTH:
        return _walk(payload, field.start, field.end, known.message_type, path + ".", depth + 1)
    elif known.is_repeated and payload[field.start : field.end][-1:] > b"\x7f":
        # The only way for packed varints to be cut short: the last byte asks for another.
        return WireFault(path.partition("[")[0], "is cut short")
    return None


def _next_field(payload: bytes, position: int, end: int) -> _Field:
    tag, position = _varint(payload, position, end, 0)
    number, wire_type = tag >> 3, tag & 7
    if number == 0 or number >= 1 << 29:
        raise _Malformed(0, "holds an impossible field number")
    if wire_type == _VARINT:
        _, value_end = _varint(payload, position, end, number)
        return _Field(number, wire_type, position, value_end)
    if wire_type == _BYTES:
        size, position = _varint(payload, position, end, number)
    elif wire_type in _FIXED_SIZES:
        size = _FIXED_SIZES[wire_type]
    else:
        raise _Malformed(number, f"field {number} has unsupported wire type {wire_type}")
    if size > end - position:
        raise _Malformed(number, "is cut short")
    return _Field(number, wire_type, position, position + size)


def _varint(payload: bytes, position: int, end: int, number: int) -> tuple[int, int]:
    value = 0
    for shift in range(_MAX_VARINT_BYTES):
        if position >= end:
            raise _Malformed(number, "is cut short")
        byte = payload[position]
        position += 1
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return value, position
    raise _Malformed(number, "holds a number of more than 10 bytes")
