"""Which decode worker computed the last turn of a conversation: it has what nobody else has."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from stateferry.core.ids import WorkerKey
from stateferry.prefix.prefix_hash import chain_hashes, encode_tokens, namespace_of

# A conversation is known by its first tokens, in so many at a time: shorter ones cost little to
# compute again.
_UNIT_TOKENS = 32
# The next prompt may have the end of the last answer in other tokens, or not at all.
_UNITS_NOTED = 2
_MOST_NOTED = 1 << 16


class LastTurns:
    """Remembers the last conversations; a hint, which may be out of date."""

    def __init__(self, most: int = _MOST_NOTED) -> None:
        self._most = most
        self._workers: OrderedDict[bytes, WorkerKey] = OrderedDict()

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
