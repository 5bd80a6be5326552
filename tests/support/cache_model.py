"""What a cache should know, kept in plain dictionaries from tokens to ids.

Evictions are the cache's own choice: the model looks at who owns an id, and forgets what is gone.
Everything else it works out for itself, from the definitions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stateferry.cache.hybrid_cache import HybridCache
from stateferry.cache.insertion import Inserted
from stateferry.cache.lookup import Match
from stateferry.cache.slots import CACHE_OWNER, SlotPool
from stateferry.prefix.prefix_hash import encode_tokens

Tokens = tuple[int, ...]
Key = tuple[bytes, Tokens]


@dataclass
class ModelTail:
    page: int
    kv_pages: tuple[int, ...]
    born: tuple[int, ...]
    finals: set[int] = field(default_factory=set)


class CacheModel:
    """By namespace and tokens: states at their end, KV units that end there, tails."""

    def __init__(self, cache: HybridCache, page_tokens: int | None) -> None:
        self.cache = cache
        self.grid = cache.grid
        self.page_tokens = page_tokens
        self.states: dict[Key, tuple[int, int]] = {}
        self.state_finals: set[Key] = set()
        self.units: dict[Key, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self.tails: dict[Key, ModelTail] = {}
        # Where somebody is: the tokens that lead there are not forgotten.
        self.ways: set[Key] = set()

    # -- lookups --------------------------------------------------------------------------------

    def check_match(self, space: bytes, tokens: Tokens, match: Match) -> None:
        """The deepest place by trying every one."""
        n = len(tokens)
        best = max(p for p in range(n + 1) if self.is_resumable(space, tokens, p))
        assert match.position == best, (match.position, best, tokens)
        kv_tokens = best
        if self.page_tokens:
            units = [g for g in range(self.grid, n + 1, self.grid) if self.has_kv(space, tokens, g)]
            kv_tokens = max([best, *units])
            assert match.kv_tokens == kv_tokens
        shared = max(g for g in range(0, n + 1, self.grid) if self.is_known(space, tokens[:g]))
        wanted = shared if shared and (space, tokens[:shared]) not in self.states else None
        assert match.branch_position == wanted
        assert max(shared, best) <= match.shared_tokens < max(shared, best) + self.grid

    def is_resumable(self, space: bytes, tokens: Tokens, position: int) -> bool:
        begin = position // self.grid * self.grid
        if begin and (space, tokens[:begin]) not in self.states:
            return False
        if position == len(tokens) and not self.has_final(space, tokens):
            return False
        return position == begin or bool(self.covering(space, tokens[:position]))

    def has_final(self, space: bytes, tokens: Tokens) -> bool:
        if len(tokens) % self.grid == 0:
            return (space, tokens) in self.state_finals
        return any(len(tokens) in self.tails[k].finals for k in self.covering(space, tokens))

    def covering(self, space: bytes, tokens: Tokens) -> list[Key]:
        """Tails from the last grid point of ``tokens`` on that begin with the rest of it."""
        begin, n = len(tokens) // self.grid * self.grid, len(tokens)
        found = [
            (key_space, known)
            for key_space, known in self.tails
            if key_space == space
            and len(known) // self.grid * self.grid == begin
            and known[:n] == tokens
        ]
        return sorted(found, key=lambda key: encode_tokens(key[1]))

    def has_kv(self, space: bytes, tokens: Tokens, end: int) -> bool:
        return all((space, tokens[:g]) in self.units for g in range(self.grid, end + 1, self.grid))

    def is_known(self, space: bytes, tokens: Tokens) -> bool:
        """Whether the tokens, whole intervals, lead to something that is kept."""
        if self.page_tokens:
            return self.has_kv(space, tokens, len(tokens))
        n = len(tokens)
        known = (*self.states, *self.ways)
        return not n or any(s == space and path[:n] == tokens for s, path in known)

    # -- changes --------------------------------------------------------------------------------

    def insert(
        self,
        space: bytes,
        tokens: Tokens,
        slots: dict[int, int],
        kv_pages: tuple[int, ...],
        tail_page: int | None,
        with_final: bool,
        result: Inserted,
    ) -> None:
        """``slots`` by position. Works out what had to be taken, and compares."""
        grid, end = self.grid, len(tokens) // self.grid * self.grid
        taken_pages: list[int] = []
        if self.page_tokens:
            k = grid // self.page_tokens
            for unit, begin in enumerate(range(0, end, grid)):
                ours = kv_pages[unit * k : (unit + 1) * k]
                if (space, tokens[: begin + grid]) not in self.units:
                    self.units[space, tokens[: begin + grid]] = (ours, self._born(ours))
                    taken_pages += ours
        taken = [s for p, s in slots.items() if (space, tokens[:p]) not in self.states]
        assert sorted(result.taken_slots) == sorted(taken)
        assert sorted(result.duplicate_slots) == sorted(set(slots.values()) - set(taken))
        for position, slot in slots.items():
            generation = self.cache.pools.state_slots.generation(slot)
            self.states.setdefault((space, tokens[:position]), (slot, generation))
            assert result.states[position] == self.states[space, tokens[:position]][0]
        taken_tail = self._insert_end(space, tokens, end, kv_pages, tail_page, with_final)
        assert result.taken_tail == (taken_tail is not None)
        taken_pages += taken_tail.kv_pages if taken_tail is not None else ()
        assert sorted(result.taken_kv_pages) == sorted(taken_pages)

    def _insert_end(
        self,
        space: bytes,
        tokens: Tokens,
        end: int,
        kv_pages: tuple[int, ...],
        tail_page: int | None,
        with_final: bool,
    ) -> ModelTail | None:
        rows = len(tokens) - end
        if end and (space, tokens[:end]) not in self.states:
            return None
        if not rows:
            if with_final and end:
                self.state_finals.add((space, tokens))
            return None
        covering = self.covering(space, tokens)
        if covering:
            if with_final:
                self.tails[covering[0]].finals.add(len(tokens))
            return None
        if tail_page is None:
            return None
        pages = tuple(kv_pages[end // self.page_tokens :]) if self.page_tokens else ()
        generation = self.cache.pools.tail_pages.generation(tail_page)
        tail = ModelTail(tail_page, pages, (generation, *self._born(pages)))
        if with_final:
            tail.finals.add(len(tokens))
        for cut in range(end + 1, len(tokens)):
            shorter = self.tails.get((space, tokens[:cut]))
            if shorter is not None:
                tail.finals |= shorter.finals
        self.tails[space, tokens] = tail
        return tail

    def _born(self, pages: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.cache.pools.kv_pages.generation(page) for page in pages)

    def forget_what_is_gone(self) -> int:
        """Look who owns what; check that nothing is left that cannot be used. Returns how many
        entries are gone."""
        pools, before = self.cache.pools, len(self.states) + len(self.tails) + len(self.units)

        def is_there(pool: SlotPool, ids: tuple[int, ...], born: tuple[int, ...]) -> bool:
            owned = {pool.owner(i) == CACHE_OWNER for i in ids}
            fine = owned != {False} and tuple(pool.generation(i) for i in ids) == born
            assert not ids or owned == {fine}
            return fine

        self.states = {
            key: (slot, born)
            for key, (slot, born) in self.states.items()
            if is_there(pools.state_slots, (slot,), (born,))
        }
        self.state_finals &= set(self.states)
        self.units = {
            key: value for key, value in self.units.items() if is_there(pools.kv_pages, *value)
        }
        tails = {}
        for key, tail in self.tails.items():
            there = is_there(pools.tail_pages, (tail.page,), tail.born[:1])
            if tail.kv_pages:
                assert is_there(pools.kv_pages, tail.kv_pages, tail.born[1:]) == there
            if there:
                tails[key] = tail
        self.tails = tails
        for space, tokens in (*self.states, *self.units, *self.tails):
            end = len(tokens) // self.grid * self.grid
            if self.page_tokens:
                assert self.has_kv(space, tokens, end)
            if end != len(tokens):
                assert not end or (space, tokens[:end]) in self.states
        return before - len(self.states) - len(self.tails) - len(self.units)
