"""Looks for stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """``text`` may be shown; ``matched`` is the stop string that ended it, or None."""

    text: str
    matched: str | None


class StopMatcher:
    """Holds back only what may still become a stop string.

    The result does not depend on how the text was cut into pieces: the stop string that completes
    first wins, the longer one among those that complete at the same character. ``include`` leaves
    it in the text.
    """

    def __init__(self, strings: Sequence[str], *, include: bool = False) -> None:
        self._strings = tuple(strings)
        self._include = include
        self._held = ""

    def push(self, text: str, may_stop: bool) -> StopMatch:
        """Add text. A stop string that completes while ``may_stop`` is false is plain text."""
        if not self._strings:
            return StopMatch(text, None)
        buffer = self._held + text
        if may_stop:
            found = self._first_match(buffer, len(self._held))
            if found is not None:
                begin, string = found
                self._held = ""
                end = begin + len(string) if self._include else begin
                return StopMatch(buffer[:end], string)
        keep = self._undecided_chars(buffer)
        self._held = buffer[len(buffer) - keep :]
        return StopMatch(buffer[: len(buffer) - keep], None)

    def flush(self) -> str:
        """What is held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, buffer: str, num_old: int) -> tuple[int, str] | None:
        """Begin and string of the match that ends first, at a character not seen before."""
        best: tuple[int, int, str] | None = None
        for string in self._strings:
            begin = buffer.find(string, max(0, num_old - len(string) + 1))
            if begin >= 0:
                candidate = (begin + len(string), begin, string)
                best = candidate if best is None else min(best, candidate)
        return None if best is None else best[1:]

    def _undecided_chars(self, buffer: str) -> int:
        """Length of the longest end of ``buffer`` that begins a stop string without being one."""
        longest = 0
        for string in self._strings:
            for size in range(min(len(string) - 1, len(buffer)), longest, -1):
                if buffer.endswith(string[:size]):
                    longest = size
                    break
        return longest
