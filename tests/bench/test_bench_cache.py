"""The cache benchmark plays its workloads, its policies differ in what they keep and agree in their
tokens, and every key is reported. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.cache import report
from bench.cache.chat import ChatShape, chat
from bench.cache.contenders import Bench, Setup
from bench.cache.drive import request_of
from bench.cache.overlap import overlap_speedup
from bench.cache.patterns import PATTERNS
from bench.cache.policies import LEAF_ONLY, ONE_SNAPSHOT, OURS, POLICIES, Share, cut
from bench.cache.resume_time import resume_rows
from bench.cache.suite import BEST_CUT, dry_rates, eviction_rates, run_policies
from bench.cache.trace import Record, divisor, families, read_records, scaled
from bench.cache.workload import Turn, Workload, in_order
from support.tiny_hybrid import write_tiny_hybrid

MEMORY = 3 << 20
SHAPE = ChatShape(
    conversations=6,
    open_at_once=3,
    turns=(2, 4),
    instruction_tokens=(10, 150),
    message_tokens=(5, 90),
    answer_tokens=(2, 9),
    again_share=0.3,
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    model_dir = write_tiny_hybrid(tmp_path_factory.mktemp("model") / "tiny", "NemotronH")
    return Bench(Setup(model_dir, MEMORY, 2048, max_requests=2, threads=1))


def talk(bench: Bench) -> Workload:
    return chat(3, bench.vocab_size, SHAPE)


def test_chat_has_all_its_turns_in_order_and_some_again(bench: Bench) -> None:
    workload = talk(bench)
    assert workload == talk(bench) != chat(4, bench.vocab_size, SHAPE)
    counts = {number: workload.order.count(number) for number in set(workload.order)}
    assert counts == {n: len(turns) for n, turns in enumerate(workload.conversations)}
    assert any(turn.again for turns in workload.conversations for turn in turns)
    assert workload.order != tuple(sorted(workload.order))


def test_policies_agree_in_tokens_and_differ_in_hits(bench: Bench) -> None:
    outcome = run_policies(bench, talk(bench), rounds=2)
    rates = outcome.hit_rate
    assert rates[OURS] > rates[ONE_SNAPSHOT] > 0
    assert rates[OURS] > rates[LEAF_ONLY] > 0
    result = json.loads(report.result_line(report.workload_result(outcome))[len("RESULT ") :])
    for key in ("hit_rate", "ttft_p50_s"):
        assert set(result[key]) == {OURS, ONE_SNAPSHOT, LEAF_ONLY}
        assert all(value > 0 for value in result[key].values())
    assert outcome.ttft_ratio(OURS) == 1.0
    # A round starts with an empty cache.
    for rounds in outcome.played.values():
        assert rounds[0].hit_rate == rounds[1].hit_rate
        assert len(rounds[0].ttft_s) == outcome.workload.num_requests


def stored(bench: Bench, policy: str, *prompts: tuple[int, ...]) -> list[int]:
    """How many tokens each prompt resumes, one after the other, with 2 tokens of output."""
    shares = POLICIES[policy].shares
    cache = bench.dry(POLICIES[policy], shares[0] if shares else None)
    found = []
    for number, prompt in enumerate(prompts):
        request = request_of(str(number), prompt, Turn((), 2))
        resumed = cache.resume(request, request.total_tokens)
        assert resumed is not None
        found.append(resumed)
        lease = cache.lease(request.request_id)
        if resumed < len(prompt):
            lease.advance(len(prompt) - resumed, bench.grid)
            lease.final = True
        cache.publish(request.request_id)
        lease.advance(1, bench.grid)
        cache.consumed(request.request_id, 7)
        cache.release(request.request_id)
        cache.check_conserved()
    return found


def test_what_each_policy_resumes(bench: Bench) -> None:
    grid = bench.grid
    first = tuple(range(3 * grid + 9))
    other = (*first[: 2 * grid + 5], *range(1000, 1000 + grid))
    third = (*first[: 2 * grid + 5], *range(2000, 2000 + grid))
    longer = (*first, 7, 99)
    prompts = (first, first, longer, other, third)
    # The boundary, nothing at the first branch, the branch point at the second.
    assert stored(bench, ONE_SNAPSHOT, *prompts) == [0, 3 * grid, 3 * grid, 0, 2 * grid]
    # Only what goes on from where a request has ended.
    assert stored(bench, LEAF_ONLY, *prompts) == [0, 0, len(first) + 1, 0, 0]
    ours = stored(bench, OURS, *prompts)
    assert ours[:3] == [0, len(first), len(first) + 1]
    assert ours[4] >= 2 * grid


def test_all_have_the_same_memory(bench: Bench) -> None:
    for policy in POLICIES.values():
        for share in policy.shares or (None,):
            sizes = bench.sizes(share)
            most = 2 * sizes.state_slot_bytes + sizes.tail_page_bytes
            most += sizes.kv_pages_for(2048) * sizes.kv_page_bytes
            assert MEMORY - most < sizes.size_bytes <= MEMORY
    seats = cut(bench.sizes(None), 0, Share(1, 0, 64))
    assert seats == bench.sizes(None)


def test_a_trace_is_read_and_made_small(tmp_path: Path, bench: Bench) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 0, "input_length": 1500, "output_length": 40, "hash_ids": [1, 2, 3]},
        {"timestamp": 5, "input_length": 1100, "output_length": 3, "hash_ids": [1, 2, 9]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = read_records(path)
    assert records[1] == Record(1100, 3, (1, 2, 9))
    assert divisor(records, 2000) == 1 and divisor(records, 800) == 2
    workload = scaled("t", records, divide=4, seed=0, vocab_size=bench.vocab_size)
    [[one], [two]] = workload.conversations
    assert (len(one.ids), one.num_output) == (375, 10)
    assert (len(two.ids), two.num_output) == (275, 1)
    assert one.ids[:256] == two.ids[:256] and one.ids[256:275] != two.ids[256:]
    path.write_text('{"input_length": 1500, "output_length": 1, "hash_ids": [1]}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_records(path)
    with pytest.raises(ValueError, match="does not fit"):
        divisor([Record(512 * 2000, 1, tuple(range(2000)))], 100)


def test_a_sample_of_a_trace_takes_whole_families() -> None:
    records = PATTERNS["tools"](1, 400)
    sample = families(records, 100)
    assert 20 < len(sample) < 300 and families(records, 1000) == records
    first = {record.hash_ids[0] for record in sample}
    assert sample == [record for record in records if record.hash_ids[0] in first]


@pytest.mark.parametrize("name", PATTERNS)
def test_without_a_model(bench: Bench, name: str) -> None:
    records = PATTERNS[name](5, 60)
    assert records == PATTERNS[name](5, 60) and len(records) == 60
    workload = scaled(
        name, records, divide=divisor(records, 2000), seed=0, vocab_size=bench.vocab_size
    )
    rates = dry_rates(bench, workload)
    assert set(rates) == {*POLICIES, BEST_CUT} and rates[BEST_CUT] > 0 < rates[OURS]
    assert set(eviction_rates(bench, workload)) == {"value", "lru"}


def test_dry_and_real_hit_rates_agree(bench: Bench) -> None:
    """One request at a time: nothing depends on time."""
    alone = Bench(Setup(bench.setup.model_dir, MEMORY, 2048, max_requests=1, threads=1))
    workload = talk(alone)
    outcome = run_policies(alone, workload, rounds=1)
    rates = dry_rates(alone, workload)
    for name, rate in ((name, rates[name]) for name in POLICIES):
        assert outcome.hit_rate[name] == pytest.approx(rate, abs=0.02)


def test_resume_against_prefill_and_overlap(bench: Bench) -> None:
    rows = resume_rows(bench, (bench.grid, 3 * bench.grid), rounds=2, seed=1)
    assert [row.prefix_tokens for row in rows] == [bench.grid, 3 * bench.grid]
    assert all(row.prefill_s > 0 and row.resume_s > 0 and row.ratio > 0 for row in rows)
    assert overlap_speedup(bench, rounds=1, seed=1, requests=3) > 0


def test_turns_wait_for_their_answers() -> None:
    workload = in_order("one", [(Turn((1, 2), 3),), (Turn((4,), 2),)])
    assert workload.most_tokens == 5 and workload.num_requests == 2
    turns = (Turn((1,) * 10, 5), Turn((2,) * 3, 4), Turn((), 7, again=True))
    assert Workload("two", (turns,), (0, 0, 0)).most_tokens == 25
