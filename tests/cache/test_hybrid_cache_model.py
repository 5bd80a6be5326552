"""Random use of the cache against a model of plain dictionaries, memory short in every way."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from stateferry.cache.hybrid_cache import Hold
from stateferry.cache.slots import SlotPool, in_transfer, quarantined
from stateferry.prefix.prefix_hash import decode_tokens, encode_tokens
from support.cache_model import CacheModel
from support.cache_user import CacheUser, Running, make_cache

SPACES = (b"one" * 8, b"one" * 8, b"two" * 8)
PICK = st.integers(0, 15)
SUFFIX = st.one_of(st.just(()), st.lists(st.sampled_from((0, 1)), max_size=9).map(tuple))
MAX_TOKENS = 24
CUT = st.one_of(st.just(MAX_TOKENS), st.integers(0, MAX_TOKENS))

# How often each thing happened in the whole run.
seen: dict[str, int] = {}


def note(what: str, happened: object = True) -> None:
    seen[what] = seen.get(what, 0) + bool(happened)


class CacheMachine(RuleBasedStateMachine):
    """Sequences begin, compute in parts, hand in, decode, end or are aborted."""

    @initialize(
        grid=st.sampled_from((2, 4)),
        attention=st.sampled_from(("none", "page", "half page")),
        scarce=st.sampled_from(("slots", "pages", "tails", "all", "nothing")),
        eviction=st.sampled_from(("value", "lru")),
        cap=st.sampled_from((0, 0, 2)),
    )
    def make(self, grid: int, attention: str, scarce: str, eviction: str, cap: int) -> None:
        page_tokens = {"none": None, "page": grid, "half page": grid // 2}[attention]
        short = {scarce} if scarce != "all" else {"slots", "pages", "tails"}
        self.user = CacheUser(
            make_cache(
                grid=grid,
                page_tokens=page_tokens,
                slots=9 if "slots" in short else 200,
                tails=4 if "tails" in short else 100,
                pages=(18 if page_tokens == grid else 36) if "pages" in short else 800,
                eviction=eviction,
                max_states_per_path=cap,
                max_sessions=2,
                session_pin_ticks=5,
            )
        )
        self.cache = self.user.cache
        self.model = CacheModel(self.cache, page_tokens)
        self.cap = cap
        self.live: dict[str, tuple[bytes, Running]] = {}
        # Handed in whole, and still read: with all KV pages, and the tail page if there is one.
        self.sending: list[tuple[Running, tuple[int, ...], int | None]] = []
        self.others: list[tuple[tuple[int, ...], ...]] = []
        # Prompts begin as others did, so that beginnings are shared, and part, all the time.
        self.texts: list[tuple[int, ...]] = [(0,)]

    @precondition(lambda self: len(self.live) < 3)
    @rule(
        space=st.sampled_from(SPACES),
        pick=PICK,
        cut=CUT,
        suffix=SUFFIX,
        extra=st.integers(0, 6),
        spare=st.sampled_from((0, 0, 1, 2)),
    )
    def begin(
        self,
        space: bytes,
        pick: int,
        cut: int,
        suffix: tuple[int, ...],
        extra: int,
        spare: int,
    ) -> None:
        self._begin(space, pick, cut, suffix, extra, spare)

    @rule(
        space=st.sampled_from(SPACES),
        pick=PICK,
        cut=CUT,
        suffix=SUFFIX,
        spare=st.sampled_from((0, 0, 1, 2)),
        keep_tail=st.booleans(),
        final=st.booleans(),
        session=st.sampled_from((None, "a", "b", "c")),
    )
    def serve(
        self,
        space: bytes,
        pick: int,
        cut: int,
        suffix: tuple[int, ...],
        spare: int,
        keep_tail: bool,
        final: bool,
        session: str | None,
    ) -> None:
        """A whole prompt at once."""
        sequence = self._begin(space, pick, cut, suffix, 0, spare)
        if sequence is not None:
            self._compute(sequence, MAX_TOKENS, 3)
            self._finish(sequence, keep_tail, final, session)

    @rule(space=st.sampled_from(SPACES), pick=PICK, cut=CUT, suffix=SUFFIX)
    def match_only(self, space: bytes, pick: int, cut: int, suffix: tuple[int, ...]) -> None:
        prompt = self._prompt(pick, cut, suffix)
        self.model.check_match(space, prompt, self.cache.match(space, encode_tokens(prompt)))

    @precondition(lambda self: self.live)
    @rule(pick=PICK, part=st.integers(1, 8), spread=st.integers(0, 3), leave=st.booleans())
    def compute(self, pick: int, part: int, spread: int, leave: bool) -> None:
        """Some more of the prompt; states go to as many own slots as there are."""
        self._compute(self._pick(pick), part, spread)
        if leave:
            self._hand_in(self._pick(pick))

    @precondition(lambda self: self.live)
    @rule(pick=PICK, count=st.integers(1, 5), leave=st.booleans())
    def decode(self, pick: int, count: int, leave: bool) -> None:
        """Some tokens more, if there is a place for them."""
        sequence = self._pick(pick)
        self._compute(sequence, MAX_TOKENS, 1)
        size, grid = self.user.page_tokens, self.cache.grid
        for _ in range(count):
            fits = not size or len(sequence.tokens) < len(sequence.kv_pages) * size
            if not fits or len(sequence.tokens) >= MAX_TOKENS:
                return
            # A decode step appends one row.
            rows = self.user.memory.tails.get(sequence.tail_page, ())
            assert len(rows) == sequence.position % grid
            sequence.tokens = (*sequence.tokens, 1)
            self._compute(sequence, 1, 1)
            note("decoded")
        if leave:
            self._hand_in(sequence)

    @precondition(lambda self: self.live)
    @rule(
        pick=PICK,
        keep_tail=st.booleans(),
        final=st.booleans(),
        session=st.sampled_from((None, "a", "b", "c")),
    )
    def finish(self, pick: int, keep_tail: bool, final: bool, session: str | None) -> None:
        self._finish(self._pick(pick), keep_tail, final, session)

    @precondition(lambda self: self.live)
    @rule(pick=PICK)
    def abort(self, pick: int) -> None:
        sequence = self._pick(pick)
        del self.live[sequence.owner]
        self.cache.unlock(sequence.hold)
        self.user.free_own(sequence)

    @precondition(lambda self: self.live)
    @rule(pick=PICK)
    def stop_reading_the_state(self, pick: int) -> None:
        self.cache.release_snapshot(self._pick(pick).hold)

    @precondition(lambda self: self.live)
    @rule(pick=PICK, final=st.booleans())
    def hand_off(self, pick: int, final: bool) -> None:
        """A sequence that computes no more goes to the cache, and is sent from there."""
        sequence = self._pick(pick)
        if sequence.position == 0:
            return
        tail_page = sequence.tail_page
        self._insert(sequence, keep_tail=True, final=final, goes_on=True)
        del self.live[sequence.owner]
        if sequence.tail_page < 0:
            note("sent from the cache")
            tail = sequence.hold.tail
            assert tail is not None and tail.page == tail_page
            pages = tuple(sequence.kv_pages[: sequence.num_shared_pages]) + tail.kv_pages
        else:
            pages = tuple(sequence.kv_pages)
        rows = sequence.position % self.cache.grid
        self.sending.append((sequence, pages, tail_page if rows else None))

    @precondition(lambda self: self.sending)
    @rule()
    def sent(self) -> None:
        sequence, _, _ = self.sending.pop(0)
        self.cache.unlock(sequence.hold)
        self.user.free_own(sequence)

    @precondition(lambda self: len(self.others) < 2)
    @rule(slots=st.integers(0, 7), tails=st.integers(0, 3), pages=st.integers(0, 20))
    def others_take(self, slots: int, tails: int, pages: int) -> None:
        """Somebody leases what the cache can spare, and not one id less; or nothing happens."""
        pools = self.cache.pools
        wanted = (slots, tails, pages if self.user.page_tokens else 0)
        possible = all(
            want <= pool.total - self._untouchable(pool)
            for want, pool in zip(wanted, pools, strict=True)
        )
        enough = all(w <= pool.num_free for w, pool in zip(wanted, pools, strict=True))
        owner = in_transfer("x") if slots % 2 else quarantined("x")
        grant = self.cache.allocate(
            owner, state_slots=wanted[0], tail_pages=wanted[1], kv_pages=wanted[2]
        )
        assert (grant is not None) == possible
        gone = self.model.forget_what_is_gone()
        note("evicted", gone)
        assert not gone or (possible and not enough)
        if grant is not None:
            self._poison(grant.state_slots, grant.tail_pages, grant.kv_pages)
            self.others.append((grant.state_slots, grant.tail_pages, grant.kv_pages))

    @precondition(lambda self: self.others)
    @rule()
    def others_return(self) -> None:
        slots, tails, pages = self.others.pop()
        self.cache.free(state_slots=slots, tail_pages=tails, kv_pages=pages)

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.model.forget_what_is_gone()
        for pool in self.cache.pools:
            assert pool.num_free == pool.total - self._untouchable(pool)

    @invariant()
    def is_sound(self) -> None:
        if not hasattr(self, "cache"):
            return
        note("steps")
        self.model.ways = {way_of(hold) for hold in self._holds() if hold.node is not None}
        self.cache.check_conservation()
        for pool in self.cache.pools:
            o = pool.occupancy
            assert o.free + o.running + o.cached + o.in_transfer + o.quarantined == pool.total
            own = [i for i, owner in pool.owners().items() if "/" not in owner]
            assert o.running == len(own)
        for _, sequence in self.live.values():
            self._check_bytes(sequence, tuple(sequence.kv_pages))
        for sequence, pages, tail_page in self.sending:
            self._check_bytes(sequence, pages)
            if tail_page is not None:
                rows = sequence.position % self.cache.grid
                held = self.user.memory.tails[tail_page][:rows]
                assert held == sequence.tokens[sequence.position - rows : sequence.position]

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for _, sequence in self.live.values():
            self.cache.unlock(sequence.hold)
            self.user.free_own(sequence)
        while self.sending:
            self.sent()
        while self.others:
            self.others_return()
        self.cache.clear()
        self.cache.check_conservation()
        assert all(pool.num_free == pool.total for pool in self.cache.pools)
        assert not list(self.cache._prefixes.tree)

    def _prompt(self, pick: int, cut: int, suffix: tuple[int, ...]) -> tuple[int, ...]:
        text = self.texts[pick % len(self.texts)]
        return (text[:cut] + suffix)[:MAX_TOKENS] or (1,)

    def _begin(
        self,
        space: bytes,
        pick: int,
        cut: int,
        suffix: tuple[int, ...],
        extra: int,
        spare: int,
    ) -> Running | None:
        tokens = self._prompt(pick, cut, suffix)
        match = self.cache.match(space, encode_tokens(tokens))
        self.model.check_match(space, tokens, match)
        match, sequence = self.user.begin(tokens, space, extra=extra, spare=spare)
        note("tail hit", match.tail_rows)
        note("boundary hit", match.position > match.tail_rows)
        note("repeated prompt", match.final is not None)
        note("branch", match.branch_position)
        note("refused", sequence is None)
        gone = self.model.forget_what_is_gone()
        note("evicted", gone)
        self.texts = [*self.texts[-15:], tokens]
        if sequence is None:
            # What was locked for the attempt is let go, and nothing was evicted for it.
            assert not gone
            note("refused with a hit", match.position)
            return None
        self.live[sequence.owner] = (space, sequence)
        return sequence

    def _pick(self, pick: int) -> Running:
        return list(self.live.values())[pick % len(self.live)][1]

    def _hand_in(self, sequence: Running) -> None:
        """A sequence that goes on leaves what is finished."""
        note("handed in", sequence.states)
        self._insert(sequence, keep_tail=False, final=False, goes_on=True)

    def _compute(self, sequence: Running, part: int, spread: int) -> None:
        end = min(sequence.position + part, len(sequence.tokens))
        grid, begin = self.cache.grid, sequence.position
        passed = [g for g in range(grid, end + 1, grid) if g > begin]
        free = len(sequence.slots) - len(sequence.states)
        wanted = passed[-min(free, 1 + spread) :] if free else []
        if end > begin:
            self.user.compute(sequence, wanted, end)

    def _finish(self, sequence: Running, keep_tail: bool, final: bool, session: str | None) -> None:
        self._insert(sequence, keep_tail=keep_tail, final=final, session=session)
        del self.live[sequence.owner]
        self.cache.unlock(sequence.hold)
        self.user.free_own(sequence)

    def _insert(
        self,
        sequence: Running,
        *,
        keep_tail: bool,
        final: bool,
        session: str | None = None,
        goes_on: bool = False,
    ) -> None:
        space, tokens = self.live[sequence.owner][0], sequence.tokens[: sequence.position]
        slots = {handle.position: handle.slot for handle in sequence.states}
        pages = tuple(sequence.kv_pages)
        if self.user.page_tokens:
            pages = pages[: -(-len(tokens) // self.user.page_tokens)]
        tail = sequence.tail_page if keep_tail and len(tokens) % self.cache.grid else None
        result = self.user.insert(
            sequence,
            space,
            # The same tokens have the same end, whoever computed it.
            final=("after", tokens) if final else None,
            session=session,
            keep_tail=keep_tail,
            goes_on=goes_on,
        )
        self.model.insert(space, tokens, slots, pages, tail, final, result)
        gone = self.model.forget_what_is_gone()
        # Only a cap or a longer tail takes something out; nothing is evicted.
        assert self.cap or gone <= 14
        note("duplicate state", result.duplicate_slots)
        note("duplicate page", result.duplicate_kv_pages)
        note("tail taken", result.taken_tail)

    def _holds(self) -> list[Hold]:
        holds = [sequence.hold for _, sequence in self.live.values()]
        return holds + [sequence.hold for sequence, _, _ in self.sending]

    def _untouchable(self, pool: SlotPool) -> int:
        """Ids that nobody can have: owned by others than the cache, or locked in it."""
        pools = self.cache.pools
        locked: set[int] = set()
        for hold in self._holds():
            if hold.tail is not None and pool is not pools.state_slots:
                is_kv = pool is pools.kv_pages
                locked |= set(hold.tail.kv_pages if is_kv else (hold.tail.page,))
            if pool is pools.state_slots and hold.point and hold.point.state:
                locked.add(hold.point.state.slot)
            if pool is pools.kv_pages:
                node = hold.node
                while node is not None:
                    locked |= {page for span in node.spans for page in span}
                    node = node.parent
        return pool.total - pool.num_free - pool.occupancy.cached + len(locked)

    def _poison(
        self, slots: tuple[int, ...], tails: tuple[int, ...], pages: tuple[int, ...]
    ) -> None:
        memory = self.user.memory
        for place, ids in ((memory.slots, slots), (memory.tails, tails), (memory.pages, pages)):
            for number in ids:
                place.pop(number, None)

    def _check_bytes(self, sequence: Running, pages: tuple[int, ...]) -> None:
        """Nobody has touched what a running sequence reads."""
        memory, size = self.user.memory, self.user.page_tokens
        if size:
            held = [
                token
                for page in pages[: -(-sequence.position // size)]
                for token in memory.pages[page]
            ]
            assert tuple(held[: sequence.position]) == sequence.tokens[: sequence.position]
        point = sequence.hold.point
        if point is not None and point.state is not None:
            state = memory.slots[point.state.slot]
            assert state == sequence.tokens[: point.position]


def way_of(hold: Hold) -> tuple[bytes, tuple[int, ...]]:
    """The namespace and the tokens that lead to what is held."""
    key, node = b"", hold.node
    assert node is not None
    while node.parent is not None:
        key, node = node.key + key, node.parent
    return node.hashes[0], decode_tokens(key)


def run(examples: int, steps: int) -> None:
    seen.clear()
    run_state_machine_as_test(
        CacheMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_agrees_with_the_model() -> None:
    run(examples=80, steps=40)
    assert all(seen.values()), seen


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_agrees_with_the_model_for_ten_thousand_steps() -> None:
    run(examples=350, steps=50)
    assert all(seen.values()) and seen["steps"] >= 10_000, seen
