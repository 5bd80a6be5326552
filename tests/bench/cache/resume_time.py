"""Time to the first token from a snapshot against that of computing the prefix, by its length."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.cache.contenders import Bench
from bench.cache.drive import request_of
from bench.cache.policies import OURS, POLICIES
from bench.cache.workload import Turn
from stateferry.cache.state_cache import StateCache
from stateferry.colocated.engine import ColocatedEngine

# After the prefix, and computed in both cases.
QUESTION_TOKENS = 8


@dataclass(frozen=True)
class ResumeRow:
    """Medians over rounds."""

    prefix_tokens: int
    prefill_s: float
    resume_s: float
    ratio: float


def resume_rows(bench: Bench, lengths: Sequence[int], rounds: int, seed: int) -> list[ResumeRow]:
    """``lengths`` are multiples of the grid. Raises ValueError when one did not resume there."""
    rng = random.Random(seed)
    engine, cache = bench.engine(POLICIES[OURS], None)
    # Pays for what is done once.
    _first_token_s(engine, cache, _ids(rng, bench.vocab_size, 2 * bench.grid), 0)
    rows = []
    for length in lengths:
        pairs = []
        for _ in range(rounds):
            prefix = _ids(rng, bench.vocab_size, length)
            asked = [_ids(rng, bench.vocab_size, QUESTION_TOKENS) for _ in range(2)]
            prefill_s = _first_token_s(engine, cache, prefix + asked[0], 0)
            pairs.append((prefill_s, _first_token_s(engine, cache, prefix + asked[1], length)))
        prefills, resumes = zip(*pairs, strict=True)
        ratio = statistics.median(prefill / resume for prefill, resume in pairs)
        rows.append(
            ResumeRow(length, statistics.median(prefills), statistics.median(resumes), ratio)
        )
    return rows


def _first_token_s(
    engine: ColocatedEngine, cache: StateCache, prompt: tuple[int, ...], resumed: int
) -> float:
    counters = cache.prefixes.counters
    before = counters.boundary_hit_tokens + counters.tail_hit_tokens
    started = time.perf_counter()
    engine.submit(request_of("one", prompt, Turn((), 1)))
    while engine.num_unfinished:
        engine.step()
    seconds = time.perf_counter() - started
    del engine.outputs["one"]
    found = counters.boundary_hit_tokens + counters.tail_hit_tokens - before
    if found != resumed:
        raise ValueError(f"a prompt of {len(prompt)} resumed at {found}, not at {resumed}")
    return seconds


def _ids(rng: random.Random, vocab_size: int, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, vocab_size) for _ in range(length))
