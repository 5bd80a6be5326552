"""The checksums of a run of segments, taken while the run arrives."""

from __future__ import annotations

from collections.abc import Sequence

from stateferry.core.errors import IntegrityError
from stateferry.transfer.blocking import Bytes, crc32c
from stateferry.transfer.manifest import SegmentSpec, segment_offsets


class ArrivalCheck:
    """Fed with the run in pieces of any size, from its start, each once. Used by one thread at a
    time."""

    def __init__(self, specs: Sequence[SegmentSpec]) -> None:
        self._specs = specs
        self._starts, self._size_bytes = segment_offsets([spec.size_bytes for spec in specs])
        self._at = 0
        self._crc = 0
        self._wrong: SegmentSpec | None = None
        self.end = 0

    def advance(self, piece: Bytes) -> None:
        """The next bytes of the run. Never raises for wrong ones: the rest must be received all the
        same."""
        first, self.end = self.end, self.end + piece.size
        while self._at < len(self._specs):
            spec, start = self._specs[self._at], self._starts[self._at]
            stop = start + spec.size_bytes
            part = piece[max(0, start - first) : max(0, stop - first)]
            self._crc = crc32c(part, self._crc)
            if stop > self.end:
                return
            if self._crc != spec.crc32c and self._wrong is None:
                self._wrong = spec
            self._at, self._crc = self._at + 1, 0

    def conclude(self) -> None:
        """Raise IntegrityError, naming the first wrong segment, unless every one was right."""
        if self._wrong is not None:
            label = f"{self._wrong.kind.value}, layer {self._wrong.layer}"
            raise IntegrityError(f"{label}: checksum mismatch")
        if self._at < len(self._specs):
            raise IntegrityError(f"{self.end} of {self._size_bytes} bytes")
