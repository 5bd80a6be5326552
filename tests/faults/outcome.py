"""What came of one scenario."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from support.client_streams import Stream


@dataclass
class Outcome:
    """Counts of streams. ``lost`` ended in an error, ``duplicated`` had a token twice or a gap,
    ``mismatches`` said something else than undisturbed. ``disturbed`` took another attempt, and
    ``stalls_s`` are the longest waits of those between two tokens."""

    name: str
    streams: int = 0
    lost: int = 0
    duplicated: int = 0
    mismatches: int = 0
    disturbed: int = 0
    stalls_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(
        self,
        streams: Sequence[Stream],
        errors: Sequence[BaseException | None],
        expected: Sequence[Stream],
    ) -> None:
        """Streams that have ended, what they ended with, and the same undisturbed."""
        self.streams += len(streams)
        for stream, error, other in zip(streams, errors, expected, strict=True):
            if isinstance(error, AssertionError):
                self.duplicated += 1
            elif error is not None:
                self.lost += 1
                self.problems.append(str(error)[:200])
            elif stream.answer != other.answer:
                self.mismatches += 1
            elif stream.attempts > 1:
                self.disturbed += 1
                self.stalls_s.append(stream.longest_gap_s)

    def demand(self, holds: bool, what: str) -> None:
        """A condition of the scenario besides."""
        if not holds:
            self.problems.append(what)

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.duplicated or self.mismatches or self.problems)


def p99(values: Iterable[float]) -> float:
    """0 of nothing."""
    ordered = sorted(values)
    return ordered[math.ceil(0.99 * len(ordered)) - 1] if ordered else 0.0
