"""How deep a prompt resumes: the scenarios that engines before us are known by."""

from __future__ import annotations

import random

import pytest

from stateferry.prefix.prefix_hash import encode_tokens, namespace_of
from stateferry.prefix.state_tracking import StateStrategy, StateTracking, check_tracking
from support.cache_user import SPACE, CacheUser, Running, make_cache

KINDS = pytest.mark.parametrize("page_tokens", [None, 64, 16])
GRID = 64


def user(page_tokens: int | None, **options: object) -> CacheUser:
    return CacheUser(
        make_cache(grid=GRID, page_tokens=page_tokens, pages=4096, **options)  # type: ignore[arg-type]
    )


def text(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(50_000) for _ in range(length)]


@KINDS
@pytest.mark.parametrize("shared_len", [257, 256, 319, 65])
def test_three_prompts_with_a_common_beginning(page_tokens: int | None, shared_len: int) -> None:
    """The second one shows where they part, the third resumes exactly there."""
    worker = user(page_tokens)
    shared = text(0, shared_len)
    found = [worker.run(shared + text(n, 4 * GRID)) for n in (1, 2, 3)]
    deepest = shared_len // GRID * GRID
    assert [match.position for match in found] == [0, 0, deepest]
    assert [match.branch_position for match in found] == [None, deepest, None]
    assert found[1].shared_tokens == shared_len
    assert found[1].kv_tokens == (deepest if page_tokens else 0)


@KINDS
def test_a_hint_makes_the_first_reuse_hit(page_tokens: int | None) -> None:
    """A short shared beginning, long different ends, and somebody who knows where it ends."""
    worker = user(page_tokens)
    shared = text(0, 257)
    worker.run(shared + text(1, 10 * GRID), hints=[257])
    assert worker.run(shared + text(2, 10 * GRID)).position == 256


@KINDS
def test_an_interval_makes_the_first_reuse_hit(page_tokens: int | None) -> None:
    worker = user(page_tokens)
    shared = text(0, 5 * GRID + 7)
    worker.run(shared + text(1, 10 * GRID), interval=2 * GRID)
    assert worker.run(shared + text(2, 10 * GRID)).position == 4 * GRID


@KINDS
@pytest.mark.parametrize("first_len", [1, GRID - 1, GRID, GRID + 1, 3 * GRID + 5])
def test_a_prompt_that_goes_on_resumes_at_the_last_token(
    page_tokens: int | None, first_len: int
) -> None:
    """Multi-turn chat: each turn starts where the last one ended, off the grid or on it."""
    worker = user(page_tokens)
    history = text(0, first_len)
    worker.run(history, session="chat")
    for turn in range(1, 6):
        longer = history + text(turn, 17 * turn)
        match = worker.run(longer, session="chat")
        assert match.position == len(history)
        assert match.tail_rows == len(history) % GRID
        history = longer


@KINDS
@pytest.mark.parametrize("length", [1, GRID - 1, GRID, GRID + 1, 3 * GRID, 3 * GRID + 7])
def test_a_repeated_prompt_runs_no_forward(page_tokens: int | None, length: int) -> None:
    worker = user(page_tokens)
    prompt = text(0, length)
    logits = object()
    assert worker.run(prompt, final=logits).position == 0
    match = worker.run(prompt)
    assert match.position == length and match.final is logits
    # One token more is another prompt, and has another end.
    match = worker.run([*prompt, 1])
    assert match.position == length and match.final is None


@KINDS
@pytest.mark.parametrize("length", [1, GRID - 1, GRID, GRID + 1, 3 * GRID, 3 * GRID + 7])
def test_without_its_end_a_repeated_prompt_computes_what_it_must(
    page_tokens: int | None, length: int
) -> None:
    """One token, where a tail allows; the last interval, where the prompt ends on the grid."""
    worker = user(page_tokens)
    prompt = text(0, length)
    worker.run(prompt)
    match = worker.run(prompt)
    begin = length // GRID * GRID
    assert match.final is None
    assert match.position == (length - 1 if begin != length else 0)


@KINDS
def test_any_token_inside_a_tail_can_be_resumed(page_tokens: int | None) -> None:
    worker = user(page_tokens)
    prompt = text(0, 2 * GRID + 40)
    worker.run(prompt)
    for rows in range(1, 41):
        begin = prompt[: 2 * GRID + rows]
        match = worker.cache.match(SPACE, encode_tokens([*begin, 1, 2, 3]))
        assert (match.position, match.tail_rows) == (len(begin), rows)
        worker.check_match(match, (*begin, 1, 2, 3))


@KINDS
def test_the_end_of_a_shorter_prompt_is_kept_in_a_longer_ones_tail(
    page_tokens: int | None,
) -> None:
    """One tail page serves both, whichever came first, and each has its own final."""
    for first, second in [(10, 30), (30, 10)]:
        worker = user(page_tokens)
        prompt = text(0, GRID + 30)
        ends = {10: object(), 30: object()}
        worker.run(prompt[: GRID + first], final=ends[first])
        worker.run(prompt[: GRID + second], final=ends[second])
        assert worker.cache.occupancy()["tail page"].cached == 1
        for rows, end in ends.items():
            assert worker.run(prompt[: GRID + rows]).final is end


@KINDS
def test_tails_that_part_are_both_there(page_tokens: int | None) -> None:
    worker = user(page_tokens)
    base = text(0, GRID)
    prompts = [base + [7] * shared + text(shared, 20) for shared in range(10)]
    for prompt in prompts:
        worker.run(prompt)
    for shared, prompt in enumerate(prompts):
        assert worker.run(prompt).position == len(prompt) - 1
        other = base + [7] * shared + [60_000 + shared] * 5
        assert worker.cache.match(SPACE, encode_tokens(other)).position == GRID + shared


@KINDS
def test_tenants_share_nothing(page_tokens: int | None) -> None:
    worker = user(page_tokens)
    prompt = text(0, 5 * GRID + 3)
    mine, theirs = (namespace_of((salt, "weights", "layout")) for salt in ("a", "b"))
    worker.run(prompt, mine, final=object())
    match = worker.run(prompt, theirs)
    assert (match.position, match.shared_tokens, match.branch_position) == (0, 0, None)
    assert worker.run(prompt, mine).position == len(prompt)


@KINDS
def test_counters_tell_what_was_hit(page_tokens: int | None) -> None:
    worker = user(page_tokens)
    prompt = text(0, 2 * GRID + 10)
    worker.run(prompt, final=object())
    worker.run(prompt)
    worker.run(prompt[: GRID + 5] + text(1, 9))
    c = worker.cache.counters
    assert c.lookups == 3 and c.repeated_prompts == 1
    assert c.prompt_tokens == 2 * len(prompt) + GRID + 14
    assert (c.boundary_hit_tokens, c.tail_hit_tokens) == (2 * GRID, 10)
    assert c.kv_only_tokens == (GRID if page_tokens else 0)
    # The last interval's keys and values, in one page or in several.
    assert (c.tail_copies, c.kv_copies) == (1, -(-10 // page_tokens) if page_tokens else 0)


def decode(worker: CacheUser, sequence: Running, tracking: StateTracking, outputs: int) -> None:
    """One token at a time, as a decode worker would: each grid point goes to the slot that waits
    for it, and a tracked one to the cache if there is another slot to wait in its place."""
    cache, reads = worker.cache, None
    for token in text(99, outputs):
        sequence.tokens = (*sequence.tokens, token)
        position = sequence.position + 1
        if position % GRID:
            worker.compute(sequence, [])
            continue
        waiting = [slot for slot in sequence.slots if slot != reads]
        worker.compute(sequence, [])
        worker.memory.slots[waiting[0]] = sequence.tokens
        reads = waiting[0]
        if not tracking.keeps_boundary(position):
            continue
        spare = cache.allocate(sequence.owner, state_slots=1)
        if spare is None:
            cache.counters.snapshots_skipped += 1
            continue
        sequence.states = [cache.state_handle(reads, position).written(position)]
        result = worker.insert(sequence, goes_on=True)
        assert result.taken_slots == (reads,)
        sequence.slots += spare.state_slots
        cache.check_conservation()


@KINDS
@pytest.mark.parametrize("strategy", ["extra_buffer", "no_buffer", "off"])
def test_a_turn_that_was_cut_off_left_its_tracked_states(
    page_tokens: int | None, strategy: str
) -> None:
    """The next turn hits at least floor((history - 1) / interval) * interval, though the first one
    never came to its end."""
    worker, interval = user(page_tokens), 2 * GRID
    tracking = check_tracking(
        strategy=strategy,
        grid=GRID,
        interval=interval,
        draft_tokens=0,
        d_conv=4,
        page_tokens=page_tokens,
    )
    prompt = text(0, GRID + 9)
    _, sequence = worker.begin(prompt, extra=7 * GRID)
    assert sequence is not None
    worker.compute(sequence, [])
    decode(worker, sequence, tracking, 7 * GRID - 20)
    history = list(sequence.tokens)
    worker.cache.unlock(sequence.hold)
    worker.free_own(sequence)
    match = worker.run([*history, 1, 2, 3])
    kept = (len(history) - 1) // interval * interval
    assert match.position == (kept if strategy == "extra_buffer" else 0)
    assert kept == 6 * GRID


@KINDS
def test_without_a_spare_slot_a_tracked_state_is_skipped_and_counted(
    page_tokens: int | None,
) -> None:
    worker = user(page_tokens, slots=2)
    tracking = StateTracking(StateStrategy.EXTRA_BUFFER, GRID, GRID)
    _, sequence = worker.begin(text(0, 9), extra=4 * GRID)
    assert sequence is not None
    worker.compute(sequence, [])
    decode(worker, sequence, tracking, 3 * GRID)
    assert worker.cache.counters.snapshots_skipped == 3
    worker.cache.unlock(sequence.hold)
    worker.free_own(sequence)
    worker.cache.check_conservation()
    assert all(pool.num_free == pool.total for pool in worker.cache.pools)
