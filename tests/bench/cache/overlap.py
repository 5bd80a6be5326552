"""What planning a step while the one before runs gives."""

from __future__ import annotations

import random
import statistics

from bench.cache.contenders import Bench
from bench.cache.drive import play
from bench.cache.policies import OURS, POLICIES
from bench.cache.workload import Turn, in_order


def overlap_speedup(bench: Bench, rounds: int, seed: int, requests: int = 24) -> float:
    """Throughput with overlap over that without, the median of the rounds' ratios: requests of one
    to three grid intervals that are answered with as much."""
    rng = random.Random(seed)
    turns = []
    for _ in range(requests):
        length = rng.randrange(bench.grid, 3 * bench.grid)
        ids = tuple(rng.randrange(3, bench.vocab_size) for _ in range(length))
        turns.append((Turn(ids, length),))
    workload = in_order("overlap", turns)
    ratios = []
    for number in range(rounds):
        wall_s = {}
        for overlap in (True, False) if number % 2 else (False, True):
            engine, cache = bench.engine(POLICIES[OURS], None, overlap=overlap)
            wall_s[overlap] = play(engine, cache, workload, bench.setup.max_requests).wall_s
        ratios.append(wall_s[False] / wall_s[True])
    return statistics.median(ratios)
