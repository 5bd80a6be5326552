"""Reading and writing the fields of a message body: little endian, every length checked."""

from __future__ import annotations

import struct

from stateferry.core.errors import FrameError
from stateferry.core.ids import WorkerKey

TEXT_MAX_BYTES = 256

_U8 = struct.Struct("<B")
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class BodyWriter:
    """Appends fields to a body. Raises FrameError for values that do not fit their field."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def u8(self, value: int) -> None:
        self._number(_U8, value)

    def u16(self, value: int) -> None:
        self._number(_U16, value)

    def u32(self, value: int) -> None:
        self._number(_U32, value)

    def u64(self, value: int) -> None:
        self._number(_U64, value)

    def blob(self, value: bytes, max_bytes: int) -> None:
        """Bytes behind a 32-bit length."""
        if len(value) > max_bytes:
            raise FrameError(f"{len(value)} bytes in a field of at most {max_bytes}")
        self.u32(len(value))
        self._parts.append(value)

    def text(self, value: str) -> None:
        self.blob(value.encode(), TEXT_MAX_BYTES)

    def worker(self, key: WorkerKey) -> None:
        self.text(key.worker_id)
        self.u64(key.incarnation)

    def finish(self) -> bytes:
        return b"".join(self._parts)

    def _number(self, layout: struct.Struct, value: int) -> None:
        try:
            self._parts.append(layout.pack(value))
        except struct.error as error:
            raise FrameError(f"{value!r} does not fit in {layout.size} bytes") from error


class BodyReader:
    """Takes fields off a body. Raises FrameError where the body is too short or a field is odd."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    def u8(self) -> int:
        return self._number(_U8)

    def u16(self) -> int:
        return self._number(_U16)

    def u32(self) -> int:
        return self._number(_U32)

    def u64(self) -> int:
        return self._number(_U64)

    def blob(self, max_bytes: int) -> bytes:
        size_bytes = self.u32()
        if size_bytes > max_bytes:
            raise FrameError(f"{size_bytes} bytes in a field of at most {max_bytes}")
        start = self._advance(size_bytes)
        return self._body[start : self._at]

    def text(self) -> str:
        try:
            return self.blob(TEXT_MAX_BYTES).decode()
        except UnicodeDecodeError as error:
            raise FrameError("a text is not UTF-8") from error

    def worker(self) -> WorkerKey:
        return WorkerKey(self.text(), self.u64())

    def finish(self) -> None:
        """Raise FrameError unless every byte was taken."""
        left = len(self._body) - self._at
        if left:
            raise FrameError(f"{left} bytes behind the end of the message")

    def _number(self, layout: struct.Struct) -> int:
        value: int = layout.unpack_from(self._body, self._advance(layout.size))[0]
        return value

    def _advance(self, size_bytes: int) -> int:
        start = self._at
        if size_bytes > len(self._body) - start:
            raise FrameError("the message ends inside a field")
        self._at = start + size_bytes
        return start
