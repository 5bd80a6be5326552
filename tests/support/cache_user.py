"""Plays a worker: runs prompts through a cache as a prefill or decode worker would, and writes into
every page and slot what a model would have written there, so that a wrong byte shows.

The "state" after some tokens is the tuple of them; so is every page's content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from stateferry.cache.cached_prefixes import CachePools
from stateferry.cache.handles import StateHandle
from stateferry.cache.host_tier import PlaceBytes
from stateferry.cache.hybrid_cache import CacheOptions, Hold, HybridCache
from stateferry.cache.insertion import Computed, Inserted
from stateferry.cache.lookup import Match
from stateferry.cache.page_copy import HostBlob, Kind, PageCopy
from stateferry.cache.slots import SlotPool
from stateferry.prefix.prefix_hash import encode_tokens, namespace_of
from stateferry.prefix.snapshot_plan import plan_snapshots

SPACE = namespace_of(("tenant", "weights", "layout"))
LAYOUT = "layout"

Tokens = tuple[int, ...]

# In host memory: a state has four bytes, all else one per token.
SIZES = PlaceBytes(state=4, tail_row=1, kv_row=1)


def make_cache(
    *,
    grid: int = 4,
    slots: int = 64,
    tails: int = 64,
    pages: int = 256,
    page_tokens: int | None = 4,
    copies: list[PageCopy] | None = None,
    **options: object,
) -> HybridCache:
    """Slots count from 1, as on a worker."""
    pools = CachePools(
        SlotPool("state slot", slots, first=1),
        SlotPool("tail page", tails),
        SlotPool("KV page", pages if page_tokens else 0),
    )
    return HybridCache(
        pools,
        grid=grid,
        page_tokens=page_tokens,
        layout=LAYOUT,
        options=CacheOptions(**options),  # type: ignore[arg-type]
        copies=copies,
        sizes=SIZES,
    )


@dataclass
class Memory:
    """What lies in each place: tokens, or absent after it was poisoned."""

    slots: dict[int, Tokens] = field(default_factory=dict)
    tails: dict[int, Tokens] = field(default_factory=dict)
    pages: dict[int, Tokens] = field(default_factory=dict)

    def of(self, kind: Kind) -> dict[int, Tokens]:
        return {"state": self.slots, "tail": self.tails, "kv": self.pages}[kind]


@dataclass
class Running:
    """A running sequence: its own ids and what it shares."""

    owner: str
    tokens: Tokens
    position: int
    hold: Hold
    slots: list[int]
    tail_page: int
    kv_pages: list[int]
    num_shared_pages: int
    states: list[StateHandle] = field(default_factory=list)


class CacheUser:
    """One worker over one cache, which leaves what is to be copied in ``due``."""

    def __init__(self, cache: HybridCache, due: list[PageCopy] | None = None) -> None:
        self.cache = cache
        self.due = [] if due is None else due
        self.memory = Memory()
        self.page_tokens = cache._page_tokens
        self._count = 0

    # -- prompts --------------------------------------------------------------------------------

    def begin(
        self, tokens: Sequence[int], space: bytes = SPACE, *, extra: int = 0, spare: int = 0
    ) -> tuple[Match, Running | None]:
        """Match, lock, lease and copy, for a prompt that may grow by ``extra`` tokens. ``spare``
        slots are wanted for optional snapshots. None when memory is short."""
        tokens = tuple(tokens)
        cache = self.cache
        match = cache.match(space, encode_tokens(tokens))
        hold = cache.lock(match)
        self._count += 1
        owner = f"r{self._count}"
        shared = cache.shared_kv_pages(match)
        wanted = -(-(len(tokens) + extra) // self.page_tokens) if self.page_tokens else 0
        grant = cache.allocate(
            owner, state_slots=2 + spare, tail_pages=1, kv_pages=max(wanted - shared, 0)
        )
        # As a launch would: before anything is written to what was granted.
        self.make_copies()
        self.check_match(match, tokens)
        if grant is None:
            cache.unlock(hold)
            return match, None
        cache.count_hit(match)
        for slot in grant.state_slots:
            self.memory.slots.pop(slot, None)
        for page in grant.tail_pages:
            self.memory.tails.pop(page, None)
        for page in grant.kv_pages:
            self.memory.pages.pop(page, None)
        self._copy(match, grant.tail_pages[0], grant.kv_pages)
        cache.release_tail(hold)
        return match, Running(
            owner=owner,
            tokens=tokens,
            position=match.position,
            hold=hold,
            slots=list(grant.state_slots),
            tail_page=grant.tail_pages[0],
            kv_pages=[*match.kv_pages[:shared], *grant.kv_pages],
            num_shared_pages=shared,
        )

    def compute(self, sequence: Running, boundaries: Sequence[int], end: int | None = None) -> None:
        """Consume the prompt up to ``end`` and write the states of ``boundaries`` to own slots."""
        tokens, grid = sequence.tokens, self.cache.grid
        end = len(tokens) if end is None else end
        free = [s for s in sequence.slots if s not in {h.slot for h in sequence.states}]
        assert len(free) >= len(boundaries)
        for position, slot in zip(boundaries, free, strict=False):
            self.memory.slots[slot] = tokens[:position]
            handle = self.cache.state_handle(slot, position)
            sequence.states.append(handle.written(1))
        self.memory.tails[sequence.tail_page] = tokens[end // grid * grid : end]
        if self.page_tokens:
            size = self.page_tokens
            for number in range(sequence.position // size, -(-end // size)):
                page = sequence.kv_pages[number]
                assert self.cache.pools.kv_pages.owner(page) == sequence.owner
                self.memory.pages[page] = tokens[number * size : min((number + 1) * size, end)]
        sequence.position = end

    def finish(
        self,
        sequence: Running,
        space: bytes = SPACE,
        *,
        final: object | None = None,
        session: str | None = None,
        keep_tail: bool = True,
    ) -> Inserted:
        """Leave everything to the cache, free the rest."""
        result = self.insert(sequence, space, final=final, session=session, keep_tail=keep_tail)
        self.cache.unlock(sequence.hold)
        self.free_own(sequence)
        return result

    def insert(
        self,
        sequence: Running,
        space: bytes = SPACE,
        *,
        final: object | None = None,
        session: str | None = None,
        keep_tail: bool = False,
        goes_on: bool = False,
    ) -> Inserted:
        """Hand in what has been computed so far; with ``goes_on`` the sequence reads on from it."""
        tokens, size = sequence.tokens[: sequence.position], self.page_tokens
        tail = None
        if keep_tail and len(tokens) % self.cache.grid:
            tail = self.cache.tail_handle(sequence.tail_page, len(tokens)).written(1)
        num_pages = -(-len(tokens) // size) if size else 0
        result = self.cache.insert(
            Computed(
                namespace=space,
                key=encode_tokens(tokens),
                owner=sequence.owner,
                kv_pages=tuple(sequence.kv_pages[:num_pages]),
                states=tuple(sequence.states),
                tail=tail,
                final=final,
            ),
            hold=sequence.hold if goes_on else None,
            session=session,
        )
        sequence.slots = [s for s in sequence.slots if s not in result.taken_slots]
        sequence.states = []
        self.cache.free(kv_pages=result.duplicate_kv_pages)
        for page in result.duplicate_kv_pages:
            del self.memory.pages[page]
        # What is the cache's now, whether it was or has just become so, is read in place.
        sequence.kv_pages[: len(result.kv_pages)] = result.kv_pages
        sequence.num_shared_pages = max(sequence.num_shared_pages, len(result.kv_pages))
        if result.taken_tail:
            sequence.tail_page = -1
            taken = set(result.taken_kv_pages)
            own = sequence.kv_pages[sequence.num_shared_pages :]
            sequence.kv_pages[sequence.num_shared_pages :] = [p for p in own if p not in taken]
        return result

    def free_own(self, sequence: Running) -> None:
        """Free, and poison, what is not the cache's."""
        tails = [sequence.tail_page] if sequence.tail_page >= 0 else []
        pages = sequence.kv_pages[sequence.num_shared_pages :]
        self.cache.free(state_slots=sequence.slots, tail_pages=tails, kv_pages=pages)
        for slot in sequence.slots:
            self.memory.slots.pop(slot, None)
        for tail in tails:
            self.memory.tails.pop(tail, None)
        for page in pages:
            self.memory.pages.pop(page, None)

    def run(
        self,
        tokens: Sequence[int],
        space: bytes = SPACE,
        *,
        hints: Sequence[int] = (),
        interval: int = 0,
        final: object | None = None,
        session: str | None = None,
        spare: int = 8,
    ) -> Match:
        """A whole prompt, from match to unlock, with planned snapshots."""
        match, sequence = self.begin(tokens, space, spare=spare)
        assert sequence is not None
        if match.position < len(tokens):
            plan = plan_snapshots(
                len(tokens),
                match.position,
                self.cache.grid,
                spare_slots=spare,
                branch_position=match.branch_position,
                hints=hints,
                interval=interval,
            )
            self.compute(sequence, plan.boundaries)
            self.finish(sequence, space, final=final, session=session)
        else:
            self.cache.unlock(sequence.hold)
            self.free_own(sequence)
        self.cache.check_conservation()
        return match

    # -- what must be there ---------------------------------------------------------------------

    def check_match(self, match: Match, tokens: Tokens) -> None:
        """Every byte that the match promises is the right one."""
        begin = match.position - match.tail_rows
        assert begin % self.cache.grid == 0
        assert match.position < len(tokens) or match.final is not None
        if match.state is None:
            assert begin == 0
        else:
            assert match.state.position == begin
            assert self.memory.slots[match.state.slot] == tokens[:begin]
        if match.tail_rows:
            assert match.tail_page is not None
            rows = self.memory.tails[match.tail_page][: match.tail_rows]
            assert rows == tokens[begin : match.position]
        if self.page_tokens:
            held = [t for page in match.kv_pages for t in self.memory.pages[page]]
            assert tuple(held[: match.position]) == tokens[: match.position]

    def make_copies(self) -> None:
        """All that are due, in order."""
        for copy in self.due:
            place = self.memory.of(copy.kind)
            if isinstance(copy.target, HostBlob):
                assert isinstance(copy.source, int)
                content = place[copy.source]
                copy.target.content = content if copy.kind == "state" else content[: copy.rows]
            else:
                assert isinstance(copy.source, HostBlob)
                place[copy.target] = copy.source.content  # type: ignore[assignment]
        self.due.clear()

    def _copy(self, match: Match, tail_page: int, kv_pages: tuple[int, ...]) -> None:
        for copy in self.cache.copies(match, tail_page, kv_pages):
            assert isinstance(copy.source, int) and isinstance(copy.target, int)
            place = self.memory.of(copy.kind)
            place[copy.target] = place[copy.source][: copy.rows]
            assert len(place[copy.target]) == copy.rows
