"""A prompt that resumes from what is cached gives the tokens, and the bytes of their
log-probabilities, of one that is computed: whatever it resumes from, cut how, and beside whom."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from stateferry.colocated.engine import ColocatedEngine, Output
from stateferry.config import CacheSection
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions
from stateferry.worker.parts import EngineParts
from support.local_engine import local_engine
from support.tiny_hybrid import ARCHITECTURES, CHUNK, write_tiny_hybrid
from support.tiny_model import write_tiny_model

CONTEXT = 16 * CHUNK
EDGES = (1, 2, 3, 4, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 5 * CHUNK + 7)


@pytest.fixture(scope="module", params=["Mamba2", *ARCHITECTURES])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("model") / "tiny"
    if request.param == "Mamba2":
        return write_tiny_model(target, chunk_size=CHUNK)
    return write_tiny_hybrid(target, request.param)


def engine(
    model_dir: Path, cache: CacheSection, budget: int = 1 << 20, overlap: bool = False
) -> tuple[ColocatedEngine, EngineParts]:
    return local_engine(
        model_dir,
        max_requests=8,
        budget_tokens=budget,
        max_context_tokens=CONTEXT,
        cache=cache,
        overlap=overlap,
    )


def ask(
    name: str,
    ids: tuple[int, ...],
    tokens: int = 12,
    temperature: float = 0.0,
    hints: tuple[int, ...] = (),
) -> GenerationRequest:
    sampling = SamplingParams(temperature, 0, 1.0, seed=7, logprobs=0)
    return GenerationRequest(
        name, ids, sampling, StopConditions(tokens, 0, frozenset()), snapshot_hints=hints
    )


def key(output: Output) -> list[tuple[int, str]]:
    return [(t.token_id, float.hex(t.logprob or 0.0)) for t in output.tokens]


class Oracle:
    """Computes every prompt, one at a time."""

    def __init__(self, model_dir: Path) -> None:
        self._engine, _ = engine(model_dir, CacheSection(enabled=False))
        self._known: dict[object, list[tuple[int, str]]] = {}

    def __call__(self, request: GenerationRequest) -> list[tuple[int, str]]:
        what = (request.prompt_ids, request.sampling, request.stop)
        if what not in self._known:
            [output] = self._engine.generate([request]).values()
            self._known[what] = key(output)
        return self._known[what]


def words(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, 259) for _ in range(length))


@pytest.mark.parametrize("length", EDGES)
def test_a_repeated_prompt(model_dir: Path, length: int) -> None:
    ids = words(random.Random(length), length)
    cached, parts = engine(model_dir, CacheSection(memory_bytes=1 << 20))
    expected = Oracle(model_dir)(ask("x", ids))
    for number in range(3):
        [output] = cached.generate([ask(str(number), ids)]).values()
        assert key(output) == expected
        parts.cache.check_conserved()
    assert parts.cache.prefixes.counters.repeated_prompts == 2


def test_every_depth_of_one_prompt(model_dir: Path) -> None:
    """Prompts that leave a long one at each of its tokens, near and on grid points."""
    rng = random.Random(3)
    oracle = Oracle(model_dir)
    cached, parts = engine(model_dir, CacheSection(memory_bytes=1 << 20), budget=CHUNK)
    long = words(rng, 4 * CHUNK + 9)
    cached.generate([ask("long", long, hints=(2 * CHUNK + 5,))])
    for depth in (*range(1, 8), *range(CHUNK - 2, CHUNK + 3), 2 * CHUNK, 3 * CHUNK + 1, len(long)):
        request = ask(f"d{depth}", (*long[:depth], *words(rng, 5)))
        [output] = cached.generate([request]).values()
        assert key(output) == oracle(request), depth
        parts.cache.check_conserved()
    counters = parts.cache.prefixes.counters
    assert counters.boundary_hit_tokens and counters.tail_hit_tokens


@pytest.mark.parametrize("overlap", [False, True])
def test_a_chat_resumes_at_its_last_token(model_dir: Path, overlap: bool) -> None:
    rng = random.Random(5)
    oracle = Oracle(model_dir)
    cached, parts = engine(model_dir, CacheSection(memory_bytes=1 << 20), overlap=overlap)
    history, consumed = words(rng, 21), 0
    counters = parts.cache.prefixes.counters
    for turn in range(8):
        before = counters.boundary_hit_tokens + counters.tail_hit_tokens
        request = ask(f"t{turn}", history, tokens=17)
        [output] = cached.generate([request]).values()
        assert key(output) == oracle(request), turn
        resumed = counters.boundary_hit_tokens + counters.tail_hit_tokens - before
        # All that was consumed: the last token of an answer is not.
        assert resumed == consumed
        consumed = len(history) + 16
        history = (*history, *output.token_ids, *words(rng, 3 + turn))
    assert bool(cached.num_overlapped) == overlap


@pytest.mark.parametrize("overlap", [False, True])
def test_where_an_unforeseen_end_is_resumed(model_dir: Path, overlap: bool) -> None:
    """Ended by a stop id at and around grid points. With overlap one more step has run by then, and
    may have passed a grid point: nothing of that is to be seen."""
    rng = random.Random(8)
    oracle = Oracle(model_dir)
    cached, parts = engine(model_dir, CacheSection(memory_bytes=2 << 20), overlap=overlap)
    counters = parts.cache.prefixes.counters
    for length in range(CHUNK - 6, CHUNK + 2):
        ids = words(rng, length)
        free = ask("x", ids, tokens=30, temperature=2.0)
        tokens = [token for token, _ in oracle(free)]
        at = next(n for n in range(4, 30) if tokens.index(tokens[n]) == n)
        stop = StopConditions(30, 0, frozenset({tokens[at]}))
        [output] = cached.generate([replace(free, stop=stop)]).values()
        assert output.token_ids == tokens[: at + 1]
        parts.cache.check_conserved()
        before = counters.boundary_hit_tokens + counters.tail_hit_tokens
        request = ask(f"n{length}", (*ids, *tokens[: at + 1], 5, 6))
        [output] = cached.generate([request]).values()
        assert key(output) == oracle(request)
        assert counters.boundary_hit_tokens + counters.tail_hit_tokens - before == length + at


@pytest.mark.parametrize("overlap", [False, True])
def test_what_was_cut_off_is_resumed_right(model_dir: Path, overlap: bool) -> None:
    """Aborted at and around a grid point, with overlap while two steps are in flight, of which the
    second one may have written over a tail."""
    rng = random.Random(9)
    oracle = Oracle(model_dir)
    cached, parts = engine(model_dir, CacheSection(memory_bytes=2 << 20), overlap=overlap)
    counters = parts.cache.prefixes.counters
    depths = []
    for number in range(CHUNK - 8, CHUNK + 3):
        ids, name = words(rng, 5), f"cut{number}"
        cached.submit(ask(name, ids, 60, temperature=2.0))
        while len(cached.outputs[name].tokens) < number - len(ids):
            cached.step()
        tokens = cached.outputs[name].token_ids
        if overlap:
            # As a worker's loop does at once: the second one.
            cached._launch_decode()
            assert len(cached._in_flight) == 2
        cached.abort(name)
        cached.settle()
        parts.cache.check_conserved()
        before = counters.boundary_hit_tokens + counters.tail_hit_tokens
        request = ask(f"n{number}", (*ids, *tokens, 5, 6))
        [output] = cached.generate([request]).values()
        assert key(output) == oracle(request), number
        depths.append(counters.boundary_hit_tokens + counters.tail_hit_tokens - before)
    # All but the last token where nothing was in flight; the prompt at least.
    if overlap:
        assert min(depths) <= 5 < CHUNK - 8 < max(depths)
    else:
        assert depths == [number - 1 for number in range(CHUNK - 8, CHUNK + 3)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("at", [1, 8, CHUNK - 1])
def test_preemption_keeps_what_was_decoded(model_dir: Path, at: int, overlap: bool) -> None:
    rng = random.Random(at)
    oracle = Oracle(model_dir)
    cached, parts = engine(model_dir, CacheSection(memory_bytes=2 << 20), overlap=overlap)
    requests = {
        f"r{n}": ask(f"r{n}", words(rng, n), at + 6, temperature=0.9) for n in (1, CHUNK - 1, 40)
    }
    for request in requests.values():
        cached.submit(request)
    left = set(requests)
    while cached.num_unfinished:
        cached.step()
        for name in [n for n in sorted(left) if len(cached.outputs[n].tokens) >= at]:
            left.remove(name)
            assert cached.preempt(name)
            parts.cache.check_conserved()
    assert not left
    for name, request in requests.items():
        assert key(cached.outputs[name]) == oracle(request)
    hit = parts.cache.prefixes.counters
    assert hit.boundary_hit_tokens + hit.tail_hit_tokens >= sum(
        request.prompt_len + at - 1 for request in requests.values()
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("memory_bytes", [0, 300_000, 4_000_000])
def test_a_crowd_that_shares(model_dir: Path, seed: int, memory_bytes: int) -> None:
    """Random prompts off a few stems, repeated, cut and continued, eight at a time, with as much
    memory for the cache as it likes, little, and none but what is idle."""
    rng = random.Random(seed)
    oracle = Oracle(model_dir)
    cached, parts = engine(
        model_dir,
        CacheSection(memory_bytes=memory_bytes, tokens_per_state=64),
        budget=rng.choice([CHUNK, 3 * CHUNK, 1 << 20]),
        overlap=bool(seed % 2),
    )
    prompts = [words(rng, rng.choice(EDGES)) for _ in range(3)]
    requests: dict[str, GenerationRequest] = {}
    alive: list[str] = []
    for number in range(60):
        stem = rng.choice(prompts)
        cut = rng.choice([len(stem), rng.randint(0, len(stem))])
        ids = (*stem[:cut], *words(rng, rng.choice([0, 1, 5, CHUNK, 40])))[: CONTEXT - 60] or (5,)
        if requests and rng.random() < 0.2:
            ids = rng.choice(list(requests.values())[-5:]).prompt_ids
        name = f"r{number}"
        hints = (rng.randrange(len(ids)),) if rng.random() < 0.3 else ()
        request = ask(name, ids, rng.choice([1, 2, 7, 40]), rng.choice([0.0, 0.9]), hints)
        requests[name] = request
        cached.submit(request)
        alive.append(name)
        for _ in range(rng.choice([0, 0, 1, 5, 30])):
            if cached.num_unfinished:
                cached.step()
                parts.cache.check_conserved()
        if rng.random() < 0.1:
            cached.abort(alive.pop(rng.randrange(len(alive))))
        if rng.random() < 0.4:
            done = [n for n in alive if n in cached.outputs and cached.outputs[n].finish_reason]
            if done:
                of = rng.choice(done)
                prompts.append((*requests[of].prompt_ids, *cached.outputs[of].token_ids))
    while cached.num_unfinished:
        cached.step()
        parts.cache.check_conserved()
    compared = 0
    for name, output in cached.outputs.items():
        assert key(output) == oracle(requests[name]), name
        compared += 1
    counters = parts.cache.prefixes.counters
    assert compared > 40
    assert counters.tail_copies
    assert bool(counters.kv_copies) == bool(parts.cache.pools.kv.num_pages)
    assert counters.boundary_hit_tokens and counters.tail_hit_tokens
    # A prompt's end is kept only where a tail page is to spare.
    assert counters.repeated_prompts or not memory_bytes
    if memory_bytes < 1_000_000:
        assert counters.states_evicted and counters.tails_evicted
