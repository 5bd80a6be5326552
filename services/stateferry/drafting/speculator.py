"""The drafts of one engine's sequences: who guesses, how much of it, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from stateferry.drafting.ngram import NgramDrafter
from stateferry.drafting.payoff import StepCost, Trust, lengths_that_pay
from stateferry.drafting.tree import NO_DRAFT, DraftTree

# A longer prompt's beginning is not looked at.
_MOST_HISTORY = 8192
# By the length of the suffix that occurred before: up to 4, 8, 16, 31 tokens, longer.
_FIRST_TRUST = (0.5, 0.7, 0.85, 0.9, 0.95)


class Drafter(Protocol):
    """Guesses for one sequence."""

    @property
    def match_length(self) -> int:
        """Tokens that the guesses go by; 0: there are none."""

    def observe(self, token_id: int) -> None:
        """The sequence goes on with ``token_id``."""

    def propose(self, most: int) -> DraftTree:
        """At most ``most`` tokens."""


@dataclass(frozen=True, slots=True)
class Speculating:
    """A sequence that is about to consume ``token_id``; at most ``most`` tokens more may be
    guessed."""

    request_id: str
    token_id: int
    most: int


@dataclass(slots=True)
class DraftCounts:
    """Monotonic totals: drafted and accepted guesses, verifications and their seconds, seconds of
    guessing, and of how many drafts so many guesses were accepted."""

    drafted: int = 0
    accepted: int = 0
    verifications: int = 0
    verify_s: float = 0.0
    draft_s: float = 0.0
    by_accepted: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Sequence:
    drafter: Drafter
    trust: Trust
    # Of the draft that is being verified.
    level: int = 0
    draft: DraftTree = NO_DRAFT


class Speculator:
    """``begin`` a sequence; ``drafts`` -> the step runs -> ``plain_ran`` or ``verify_ran``, and
    ``observe`` of each of its sequences; ``end`` it."""

    def __init__(
        self,
        most_guesses: int,
        *,
        make: Callable[[Sequence[int]], Drafter] = NgramDrafter,
        pays: Callable[[Sequence[float], Sequence[int], StepCost], list[int]] = lengths_that_pay,
    ) -> None:
        """most_guesses: of one sequence in one step. make: a drafter, given a sequence's tokens.
        pays: how many of the guesses are worth it."""
        self.most_guesses = most_guesses
        self._make = make
        self._pays = pays
        self._histories: dict[str, Sequence[int]] = {}
        self._sequences: dict[str, _Sequence] = {}
        self._trust = Trust(first=_FIRST_TRUST)
        self.cost = StepCost()
        self.counts = DraftCounts(by_accepted=dict.fromkeys(range(most_guesses + 1), 0))

    def begin(self, request_id: str, token_ids: Sequence[int]) -> None:
        """A sequence has consumed these tokens, as far as they are known here."""
        self._histories[request_id] = token_ids[-_MOST_HISTORY:]

    def end(self, request_id: str) -> None:
        """Forget a sequence, if it is known."""
        self._histories.pop(request_id, None)
        self._sequences.pop(request_id, None)

    def drafts(self, rows: Sequence[Speculating]) -> list[DraftTree] | None:
        """What to verify, of each row; None where a step without drafts is worth more."""
        began_s = time.perf_counter()
        drafts = self._drafts(rows)
        self.counts.draft_s += time.perf_counter() - began_s
        return drafts

    def _drafts(self, rows: Sequence[Speculating]) -> list[DraftTree] | None:
        for row in rows:
            if row.request_id not in self._sequences:
                # As late as this: who ends with token 0 needs no drafter.
                history = (*self._histories.pop(row.request_id, ()), row.token_id)
                sequence = _Sequence(self._make(history), Trust(behind=self._trust))
                self._sequences[row.request_id] = sequence
        sequences = [self._sequences[row.request_id] for row in rows]
        most = []
        for row, sequence in zip(rows, sequences, strict=True):
            match = sequence.drafter.match_length
            sequence.level = _level(match)
            most.append(min(row.most, self.most_guesses) if match else 0)
        if not any(most):
            return None
        trusts = [sequence.trust.of(sequence.level) for sequence in sequences]
        lengths = self._pays(trusts, most, self.cost)
        for sequence, length, could in zip(sequences, lengths, most, strict=True):
            if length:
                sequence.draft = sequence.drafter.propose(length)
            elif could:
                sequence.trust.forget_some(sequence.level)
        drafts = [sequence.draft for sequence in sequences]
        return drafts if any(drafts) else None

    def observe(self, request_id: str, token_ids: Sequence[int]) -> None:
        """What the step gave this sequence; the guesses that were right are among it."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            # It ended while the step ran.
            return
        began_s = time.perf_counter()
        for token_id in token_ids:
            sequence.drafter.observe(token_id)
        self.counts.draft_s += time.perf_counter() - began_s
        guessed, sequence.draft = len(sequence.draft), NO_DRAFT
        if not guessed or not token_ids:
            return
        accepted = len(token_ids) - 1
        sequence.trust.learn(sequence.level, accepted, was_wrong=accepted < guessed)
        counts = self.counts
        counts.drafted += guessed
        counts.accepted += accepted
        counts.by_accepted[accepted] += 1

    def plain_ran(self, sequences: int, seconds: float) -> None:
        """A step without drafts took so long."""
        self.cost.plain_ran(sequences, seconds)

    def verify_ran(self, sequences: int, rows: int, seconds: float) -> None:
        """A verification took so long."""
        self.counts.verifications += 1
        self.counts.verify_s += seconds
        self.cost.verify_ran(sequences, rows, seconds)


def _level(match_length: int) -> int:
    """Place in _FIRST_TRUST."""
    level = max(0, match_length.bit_length() - 2)
    return min(level, len(_FIRST_TRUST) - 1)
