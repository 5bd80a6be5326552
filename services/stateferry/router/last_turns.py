"""Which workers computed the last turn of a conversation: they have what nobody else has."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from stateferry.core.ids import WorkerKey
from stateferry.prefix.prefix_hash import chain_hashes, encode_tokens, namespace_of

# A conversation is known by its first tokens, in so many at a time: shorter ones cost little to
# compute again.
_UNIT_TOKENS = 32
# The next prompt may have the end of the last answer in other tokens, or not at all.
_UNITS_NOTED = 2
_MOST_NOTED = 1 << 16


@dataclass(frozen=True, slots=True)
class LastTurn:
    """Whom the next one should go to; None: anybody."""

    prefill: WorkerKey | None = None
    decode: WorkerKey | None = None


NOBODY = LastTurn()


class LastTurns:
    """Remembers the last conversations; a hint, which may be out of date. Those that have a name
    are known by it, whatever became of their history."""

    def __init__(self, most: int = _MOST_NOTED) -> None:
        self._most = most
        self._workers: OrderedDict[bytes, WorkerKey] = OrderedDict()
        self._sessions: OrderedDict[tuple[str, str], LastTurn] = OrderedDict()

    def note_session(self, cache_salt: str, session: str, turn: LastTurn) -> None:
        """Where a turn ran; a side that did nothing for it stays what it was."""
        before = self._sessions.pop((cache_salt, session), NOBODY)
        self._sessions[cache_salt, session] = LastTurn(
            turn.prefill or before.prefill, turn.decode or before.decode
        )
        while len(self._sessions) > self._most:
            self._sessions.popitem(last=False)

    def of(self, cache_salt: str, session: str, prompt_ids: Sequence[int]) -> LastTurn:
        """By the session's name, if it has one and that is known, or by the prompt."""
        known = self._sessions.get((cache_salt, session)) if session else None
        return known or LastTurn(decode=self.worker_of(cache_salt, prompt_ids))

    def note(self, cache_salt: str, token_ids: Sequence[int], worker: WorkerKey) -> None:
        """``worker`` has consumed exactly these tokens."""
        for name in _names(cache_salt, token_ids)[-_UNITS_NOTED:]:
            self._workers[name] = worker
            self._workers.move_to_end(name)
        while len(self._workers) > self._most:
            self._workers.popitem(last=False)

    def worker_of(self, cache_salt: str, prompt_ids: Sequence[int]) -> WorkerKey | None:
        """Who has most of a prompt, if it is the next turn of a conversation."""
        for name in reversed(_names(cache_salt, prompt_ids)):
            worker = self._workers.get(name)
            if worker is not None:
                return worker
        return None


def _names(cache_salt: str, token_ids: Sequence[int]) -> list[bytes]:
    return chain_hashes(namespace_of((cache_salt,)), encode_tokens(token_ids), _UNIT_TOKENS)
