"""A second memory, for what was evicted from the first: found by the hash of its tokens, back by a
copy.

It knows no tree. An entry is named by the chain hash of the whole intervals before it (and so by
whose they are and what reads them), a tail also by its own tokens. Entries never change, so one
that came back may stay as well.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from stateferry.cache.entries import Pages, Point, Tail

Kind = Literal["state", "tail", "kv"]


class HostKey(NamedTuple):
    """``tokens`` is empty but for a tail."""

    kind: Kind
    chain_hash: bytes
    tokens: bytes = b""


@dataclass(frozen=True, slots=True)
class HostEntry:
    """``blobs`` are a copier's, one per id that was saved: a tail's page and then its KV pages.
    ``stamp`` and ``finals`` are as in the tree, a state's ``final`` at 0."""

    blobs: tuple[object, ...]
    size_bytes: int
    stamp: int | None
    finals: dict[int, object]


class HostCopier(Protocol):
    """Moves bytes between the pools and host memory. Called between steps."""

    def save(self, kind: Kind, number: int, rows: int) -> tuple[object, int]:
        """A copy of a state slot, or of the first ``rows`` places of a tail or KV page, and its
        size in bytes."""

    def load(self, kind: Kind, number: int, rows: int, blob: object) -> None:
        """Write a copy to where it may now be read. Mutates the pool."""


class HostTier(Protocol):
    """What the cache needs of a second memory."""

    @property
    def copier(self) -> HostCopier: ...

    def has(self, key: HostKey) -> bool: ...

    def get(self, key: HostKey) -> HostEntry | None:
        """The entry, which counts as used."""

    def tails_at(self, chain_hash: bytes) -> Iterable[bytes]:
        """The tokens of all tails there."""

    def put(self, key: HostKey, entry: HostEntry) -> None:
        """Keep an entry if there is a place for it."""


class HostStore:
    """Least recently used out first, within ``budget_bytes``."""

    def __init__(self, budget_bytes: int, copier: HostCopier) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.num_dropped = 0
        self._copier = copier
        self._entries: OrderedDict[HostKey, HostEntry] = OrderedDict()
        self._tails: dict[bytes, set[bytes]] = {}

    @property
    def copier(self) -> HostCopier:
        return self._copier

    def __len__(self) -> int:
        return len(self._entries)

    def has(self, key: HostKey) -> bool:
        return key in self._entries

    def get(self, key: HostKey) -> HostEntry | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def tails_at(self, chain_hash: bytes) -> Iterable[bytes]:
        return tuple(self._tails.get(chain_hash, ()))

    def put(self, key: HostKey, entry: HostEntry) -> None:
        known = self._entries.pop(key, None)
        if known is not None:
            self.used_bytes -= known.size_bytes
            entry = HostEntry(
                known.blobs, known.size_bytes, known.stamp, known.finals | entry.finals
            )
        if entry.size_bytes > self.budget_bytes:
            self._forget_tail(key)
            return
        self._entries[key] = entry
        self.used_bytes += entry.size_bytes
        if key.kind == "tail":
            self._tails.setdefault(key.chain_hash, set()).add(key.tokens)
        while self.used_bytes > self.budget_bytes:
            oldest, dropped = self._entries.popitem(last=False)
            self.used_bytes -= dropped.size_bytes
            self.num_dropped += 1
            self._forget_tail(oldest)

    def _forget_tail(self, key: HostKey) -> None:
        tails = self._tails.get(key.chain_hash)
        if key.kind == "tail" and tails is not None:
            tails.discard(key.tokens)
            if not tails:
                del self._tails[key.chain_hash]


class HostOffload:
    """Saves what is about to be evicted, unless it has been saved before."""

    def __init__(self, host: HostTier, page_tokens: int | None) -> None:
        self._host = host
        self._page_tokens = page_tokens

    def state(self, point: Point, chain_hash: bytes) -> None:
        assert point.state is not None
        finals = {} if point.final is None else {0: point.final}
        key = HostKey("state", chain_hash)
        self._put(key, (("state", point.state.slot, 0),), point.state.stamp, finals)

    def tail(self, tail: Tail, chain_hash: bytes) -> None:
        parts: list[tuple[Kind, int, int]] = [("tail", tail.page, tail.rows)]
        parts += page_rows(tail.kv_pages, tail.rows, self._page_tokens)
        self._put(HostKey("tail", chain_hash, tail.tokens), parts, tail.stamp, tail.finals)

    def kv_unit(self, pages: Pages, chain_hash: bytes) -> None:
        assert self._page_tokens
        parts = page_rows(pages, len(pages) * self._page_tokens, self._page_tokens)
        self._put(HostKey("kv", chain_hash), parts, None, {})

    def _put(
        self,
        key: HostKey,
        parts: Sequence[tuple[Kind, int, int]],
        stamp: int | None,
        finals: dict[int, object],
    ) -> None:
        if self._host.has(key):
            self._host.put(key, HostEntry((), 0, stamp, dict(finals)))
            return
        saved = [self._host.copier.save(kind, number, rows) for kind, number, rows in parts]
        blobs, sizes = tuple(blob for blob, _ in saved), [size for _, size in saved]
        self._host.put(key, HostEntry(blobs, sum(sizes), stamp, dict(finals)))


def page_rows(
    pages: Sequence[int], rows: int, page_tokens: int | None
) -> list[tuple[Kind, int, int]]:
    """How many places of each page are filled by ``rows`` tokens."""
    size = page_tokens or 1
    return [("kv", page, min(size, rows - i * size)) for i, page in enumerate(pages)]
