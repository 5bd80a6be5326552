"""What drafting is worth: how often guesses are right, and what their rows cost."""

from __future__ import annotations

from collections.abc import Sequence

# How much an older step counts by the time of the next one.
_FADE = 0.97
# One slow step says little: others may have had the processors.
_MOST_SURPRISE = 3.0
# What is thought of a row beside others before any was seen, in steps without a draft.
_ROW_COST = 0.08
_FIRST_ROW_COST = 1.05
# Steps that the thought counts for at first.
_THOUGHT_WEIGHT = 2.0


class StepCost:
    """Seconds of a verification by its number of rows, and of a step without drafts, for each
    number of sequences; learnt from those that ran."""

    def __init__(self) -> None:
        self._plain: dict[int, float] = {}
        # By number of sequences: of weight, rows, seconds, rows * rows, rows * seconds.
        self._sums: dict[int, list[float]] = {}

    def plain_ran(self, sequences: int, seconds: float) -> None:
        """A step without drafts has ended."""
        known = self._plain.get(sequences)
        if known is None:
            self._plain[sequences] = seconds
            return
        seconds = min(seconds, _MOST_SURPRISE * known)
        self._plain[sequences] = known + 0.1 * (seconds - known)

    def verify_ran(self, sequences: int, rows: int, seconds: float) -> None:
        """A verification has ended."""
        seconds = min(seconds, _MOST_SURPRISE * self.verify(sequences, rows))
        added = (1.0, float(rows), seconds, float(rows * rows), rows * seconds)
        sums = self._sums.get(sequences, [0.0] * len(added))
        self._sums[sequences] = [_FADE * old + new for old, new in zip(sums, added, strict=True)]

    def plain(self, sequences: int) -> float | None:
        """None before such a step ran."""
        return self._plain.get(sequences)

    def verify(self, sequences: int, rows: int) -> float:
        """By a line through what was seen, and through what is thought as long as that is
        little."""
        plain = self._plain.get(sequences, 1.0)
        sums = list(self._sums.get(sequences, [0.0] * 5))
        believed = _THOUGHT_WEIGHT / (1.0 + sums[0])
        for at in (sequences, sequences + 8):
            thought = plain * (_FIRST_ROW_COST + _ROW_COST * (at - sequences) / sequences**0.5)
            added = (1.0, float(at), thought, float(at * at), at * thought)
            sums = [s + believed * a for s, a in zip(sums, added, strict=True)]
        weight, x, y, xx, xy = sums
        spread = weight * xx - x * x
        slope = max(0.0, (weight * xy - x * y) / spread) if spread > 0 else 0.0
        return max((y + slope * (weight * rows - x)) / weight, 0.25 * plain)


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
        weight = 4.0
        right, tried = self._right.get(level, 0.0), self._tried.get(level, 0.0)
        return (right + weight * thought) / (tried + weight)

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
    plain = cost.plain(sequences)
    lengths = [0] * sequences
    if plain is None:
        return lengths
    chances = [trust if m else 0.0 for trust, m in zip(trusts, most, strict=True)]
    gained, rows = float(sequences), sequences
    best, best_rate = lengths, sequences / plain
    while True:
        at = max(range(sequences), key=chances.__getitem__)
        if not chances[at]:
            return best
        gained += chances[at]
        rows += 1
        lengths = [*lengths[:at], lengths[at] + 1, *lengths[at + 1 :]]
        rate = gained / cost.verify(sequences, rows)
        if rate > best_rate:
            best, best_rate = lengths, rate
        chances[at] = chances[at] * trusts[at] if lengths[at] < most[at] else 0.0
