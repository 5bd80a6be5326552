"""What drafting is worth: how often guesses are right, and what their rows cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace

# How much an older step counts by the time of the next one.
_FADE = 0.97
# The same by the time of a step without drafts: what was learnt once may be true no more.
_IDLE_FADE = 0.99
# One slow step says little: others may have had the processors.
_MOST_SURPRISE = 1.5
# What is thought of a row beside others before any was seen, in steps without a draft.
_ROW_COST = 0.2
_FIRST_ROW_COST = 1.1
# Steps that the thought counts for at first.
_THOUGHT_WEIGHT = 2.0
# Guesses that a thought of their chance counts for.
_THOUGHT_GUESSES = 4.0
# Guesses that are to pay must do so by this much: a step without drafts is the known quantity.
_MARGIN = 1.03


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds of a verification: of one row a sequence, and of each row more."""

    base: float
    slope: float


class StepCost:
    """Seconds of a verification by its number of rows, and of a step without drafts, for each
    number of sequences; learnt from those that ran."""

    def __init__(self) -> None:
        self._plain: dict[int, float] = {}
        # By number of sequences: of weight, rows more, seconds, their squares and products.
        self._sums: dict[int, list[float]] = {}

    def plain_ran(self, sequences: int, seconds: float) -> None:
        """A step without drafts has ended."""
        known = self._plain.get(sequences, seconds)
        seconds = min(seconds, _MOST_SURPRISE * known)
        self._plain[sequences] = known + 0.1 * (seconds - known)
        sums = self._sums.get(sequences)
        if sums is not None:
            self._sums[sequences] = [_IDLE_FADE * old for old in sums]

    def verify_ran(self, sequences: int, rows: int, seconds: float) -> None:
        """A verification has ended."""
        line, more = self.line(sequences), rows - sequences
        seconds = min(seconds, _MOST_SURPRISE * (line.base + line.slope * more))
        added = (1.0, float(more), seconds, float(more * more), more * seconds)
        sums = self._sums.get(sequences, [0.0] * len(added))
        self._sums[sequences] = [_FADE * old + new for old, new in zip(sums, added, strict=True)]

    def plain(self, sequences: int) -> float | None:
        """None before such a step ran."""
        return self._plain.get(sequences)

    def line(self, sequences: int) -> Line:
        """Through what was seen, and through what is thought as long as that is little."""
        plain = self._plain.get(sequences, 1.0)
        sums = self._sums.get(sequences, [0.0] * 5)
        believed = _THOUGHT_WEIGHT / (1.0 + sums[0])
        for more in (0, 8):
            thought = plain * (_FIRST_ROW_COST + _ROW_COST * more / sequences**0.5)
            added = (1.0, float(more), thought, float(more * more), more * thought)
            sums = [s + believed * a for s, a in zip(sums, added, strict=True)]
        weight, x, y, xx, xy = sums
        spread = weight * xx - x * x
        slope = max(0.0, (weight * xy - x * y) / spread) if spread > 0 else 0.0
        return Line(max((y - slope * x) / weight, 0.5 * plain), slope)


class Trust:
    """How likely the next guess is right when all before it were, by how much the drafter had to go
    by (``level``, small numbers). One of all sequences together stands behind each sequence's."""

    def __init__(self, behind: Trust | None = None, first: Sequence[float] = ()) -> None:
        self._behind = behind
        self._first = first
        self._right: dict[int, float] = {}
        self._tried: dict[int, float] = {}

    def of(self, level: int) -> float:
        """In (0, 1)."""
        thought = self._first[level] if self._behind is None else self._behind.of(level)
        tried = self._tried.get(level)
        if tried is None:
            return thought
        return (self._right[level] + _THOUGHT_GUESSES * thought) / (tried + _THOUGHT_GUESSES)

    def learn(self, level: int, right: int, was_wrong: bool) -> None:
        """So many guesses of a draft were right, and then one was wrong or there was none left."""
        if right or was_wrong:
            self._right[level] = 0.95 * self._right.get(level, 0.0) + right
            self._tried[level] = 0.95 * self._tried.get(level, 0.0) + right + was_wrong
        if self._behind is not None:
            self._behind.learn(level, right, was_wrong)

    def forget_some(self, level: int) -> None:
        """Nothing was tried for long: what was learnt counts for less."""
        for counts in (self._right, self._tried):
            if level in counts:
                counts[level] *= 0.98


def lengths_that_pay(trusts: Sequence[float], most: Sequence[int], cost: StepCost) -> list[int]:
    """How many guesses of each sequence to verify; all 0 where a step without drafts is worth more.
    ``trusts`` are probabilities, ``most`` the guesses that there are."""
    sequences = len(trusts)
    lengths = [0] * sequences
    plain = cost.plain(sequences)
    if plain is None or not any(most):
        return lengths
    line = cost.line(sequences)
    gained, seconds = float(sequences), line.base
    # The likeliest guess first; a heap's smallest is the one with the largest chance.
    chances = [(-trust, n) for n, trust in enumerate(trusts) if most[n]]
    heapify(chances)
    while chances:
        chance, at = -chances[0][0], chances[0][1]
        # One more row is worth it if it gives more tokens a second than there are.
        if chance * seconds <= gained * line.slope:
            break
        gained += chance
        seconds += line.slope
        lengths[at] += 1
        if lengths[at] < most[at]:
            heapreplace(chances, (-chance * trusts[at], at))
        else:
            heappop(chances)
    pays = gained / seconds > _MARGIN * sequences / plain
    return lengths if pays else [0] * sequences
