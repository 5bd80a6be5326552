"""A second memory, for what was evicted from the first: found by the hash of its tokens, back by a
copy.

It knows no tree, and touches no tensor: what moves is asked for as a copy, to be made by the next
launch. An entry is named by the chain hash of the whole intervals before it (and so by whose they
are and what reads them), a tail also by its own tokens. Entries never change, so one that came back
may stay as well.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stateferry.cache.cache_counters import CacheCounters
from stateferry.cache.entries import Pages, Point, Tail
from stateferry.cache.page_copy import HostBlob, Kind, PageCopy


class HostKey(NamedTuple):
    """``tokens`` is empty but for a tail."""

    kind: Kind
    chain_hash: bytes
    tokens: bytes = b""


@dataclass(frozen=True, slots=True)
class HostEntry:
    """``blobs`` hold one place each: a tail's page and then its KV pages. ``stamp`` and ``finals``
    are as in the tree, a state's ``final`` at 0."""

    blobs: tuple[HostBlob, ...]
    size_bytes: int
    stamp: int | None
    finals: dict[int, object]


@dataclass(frozen=True, slots=True)
class PlaceBytes:
    """Bytes of one state, and of one token's place in a tail and in a KV page."""

    state: int
    tail_row: int
    kv_row: int

    def of(self, kind: Kind, rows: int) -> int:
        """Bytes of a state, or of the first ``rows`` places of a page."""
        if kind == "state":
            return self.state
        return rows * (self.tail_row if kind == "tail" else self.kv_row)


class HostStore:
    """Least recently used out first, within ``budget_bytes``."""

    def __init__(self, budget_bytes: int, counters: CacheCounters) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._counters = counters
        self._entries: OrderedDict[HostKey, HostEntry] = OrderedDict()
        self._tails: dict[bytes, set[bytes]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def has(self, key: HostKey) -> bool:
        return key in self._entries

    def get(self, key: HostKey) -> HostEntry | None:
        """The entry, which counts as used."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def tails_at(self, chain_hash: bytes) -> Iterable[bytes]:
        """The tokens of all tails there."""
        return tuple(self._tails.get(chain_hash, ()))

    def use_again(self, key: HostKey, finals: dict[int, object]) -> bool:
        """Whether the entry is there; it counts as used, and has these ``finals`` as well."""
        entry = self.get(key)
        if entry is None:
            return False
        entry.finals.update(finals)
        return True

    def put(self, key: HostKey, entry: HostEntry) -> bool:
        """Keep a new entry, unless it is larger than all of the budget: False then."""
        if entry.size_bytes > self.budget_bytes:
            return False
        self._entries[key] = entry
        self.used_bytes += entry.size_bytes
        self._counters.host_moved_out_bytes += entry.size_bytes
        if key.kind == "tail":
            self._tails.setdefault(key.chain_hash, set()).add(key.tokens)
        while self.used_bytes > self.budget_bytes:
            oldest, dropped = self._entries.popitem(last=False)
            self.used_bytes -= dropped.size_bytes
            self._counters.host_dropped_bytes += dropped.size_bytes
            self._forget_tail(oldest)
        return True

    def _forget_tail(self, key: HostKey) -> None:
        tails = self._tails.get(key.chain_hash)
        if key.kind == "tail" and tails is not None:
            tails.discard(key.tokens)
            if not tails:
                del self._tails[key.chain_hash]


class HostOffload:
    """Moves out what is about to be evicted, unless it has been before. The copies must be made
    before the place is written again: they are asked for here, the place is handed out later."""

    def __init__(
        self,
        host: HostStore,
        copies: list[PageCopy],
        sizes: PlaceBytes,
        page_tokens: int | None,
        counters: CacheCounters,
    ) -> None:
        self._host = host
        self._copies = copies
        self._sizes = sizes
        self._page_tokens = page_tokens
        self._counters = counters

    def state(self, point: Point, chain_hash: bytes) -> None:
        assert point.state is not None
        finals = {} if point.final is None else {0: point.final}
        key = HostKey("state", chain_hash)
        if self._put(key, [("state", point.state.slot, 0)], point.state.stamp, finals):
            self._counters.states_moved_out += 1

    def tail(self, tail: Tail, chain_hash: bytes) -> None:
        parts: list[tuple[Kind, int, int]] = [("tail", tail.page, tail.rows)]
        parts += page_rows(tail.kv_pages, tail.rows, self._page_tokens)
        if self._put(HostKey("tail", chain_hash, tail.tokens), parts, tail.stamp, tail.finals):
            self._counters.tails_moved_out += 1
            self._counters.kv_pages_moved_out += len(tail.kv_pages)

    def kv_unit(self, pages: Pages, chain_hash: bytes) -> None:
        assert self._page_tokens
        parts = page_rows(pages, len(pages) * self._page_tokens, self._page_tokens)
        if self._put(HostKey("kv", chain_hash), parts, None, {}):
            self._counters.kv_pages_moved_out += len(pages)

    def _put(
        self,
        key: HostKey,
        parts: Sequence[tuple[Kind, int, int]],
        stamp: int | None,
        finals: dict[int, object],
    ) -> bool:
        """Whether anything moves."""
        if self._host.use_again(key, finals):
            return False
        size_bytes = sum(self._sizes.of(kind, rows) for kind, _, rows in parts)
        blobs = tuple(HostBlob() for _ in parts)
        if not self._host.put(key, HostEntry(blobs, size_bytes, stamp, dict(finals))):
            return False
        self._copies += [
            PageCopy(kind, number, blob, rows)
            for (kind, number, rows), blob in zip(parts, blobs, strict=True)
        ]
        return True


def page_rows(
    pages: Sequence[int], rows: int, page_tokens: int | None
) -> list[tuple[Kind, int, int]]:
    """How many places of each page are filled by ``rows`` tokens."""
    size = page_tokens or 1
    return [("kv", page, min(size, rows - i * size)) for i, page in enumerate(pages)]
