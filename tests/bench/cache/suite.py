"""All policies on one workload, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.cache.contenders import Bench
from bench.cache.drive import Played, play, play_dry
from bench.cache.policies import OURS, OURS_BEST_CUT, POLICIES, Policy, Share
from bench.cache.workload import Workload
from bench.kernels.measure import Mismatch
from stateferry.cache.hybrid_cache import CacheOptions

EVICTION = ("value", "lru")
BEST_CUT = "ours, best cut"


@dataclass
class Outcome:
    """Of one workload: what each policy did in each round, and the cut of memory it chose."""

    workload: Workload
    shares: dict[str, Share | None] = field(default_factory=dict)
    played: dict[str, list[Played]] = field(default_factory=dict)

    @property
    def hit_rate(self) -> dict[str, float]:
        return {
            name: statistics.median(one.hit_rate for one in rounds)
            for name, rounds in self.played.items()
        }

    @property
    def ttft_p50_s(self) -> dict[str, float]:
        """The median over rounds of each round's median."""
        return {
            name: statistics.median(one.ttft_p50_s for one in rounds)
            for name, rounds in self.played.items()
        }

    def ttft_ratio(self, name: str) -> float:
        """How many times ours ``name`` waits: the median of the rounds' ratios."""
        pairs = zip(self.played[name], self.played[OURS], strict=True)
        return statistics.median(theirs.ttft_p50_s / ours.ttft_p50_s for theirs, ours in pairs)


def run_policies(
    bench: Bench, workload: Workload, rounds: int, show: Callable[[str], None] = lambda text: None
) -> Outcome:
    """Raises Mismatch when two policies give different tokens."""
    outcome = Outcome(workload)
    for name, policy in POLICIES.items():
        outcome.shares[name] = best_share(bench, policy, workload)
        outcome.played[name] = []
    at_a_time = bench.setup.max_requests
    for number in range(rounds):
        names = list(POLICIES) if number % 2 == 0 else list(reversed(POLICIES))
        for name in names:
            engine, cache = bench.engine(POLICIES[name], outcome.shares[name])
            one = play(engine, cache, workload, at_a_time)
            cache.check_conserved()
            outcome.played[name].append(one)
            show(
                f"{workload.name}, round {number + 1}, {name}: hit rate {one.hit_rate:.3f}, "
                f"TTFT p50 {one.ttft_p50_s * 1e3:.1f} ms, {one.wall_s:.1f} s"
            )
    digests = {one.digest for rounds_of in outcome.played.values() for one in rounds_of}
    if len(digests) != 1:
        raise Mismatch(f"{workload.name}: the policies do not give the same tokens")
    return outcome


def best_share(bench: Bench, policy: Policy, workload: Workload) -> Share | None:
    """The cut of the memory that gives the policy most hits on this very workload; None where it
    has no choice."""
    if not policy.shares:
        return None
    at_a_time = bench.setup.max_requests
    rates = {
        share: play_dry(bench.dry(policy, share), workload, at_a_time) for share in policy.shares
    }
    return max(rates, key=lambda share: rates[share])


def dry_rates(bench: Bench, workload: Workload) -> dict[str, float]:
    """Hit rates by policy, without a model: ours as it comes and with its best cut, others with
    theirs."""
    at_a_time = bench.setup.max_requests
    return {
        name: play_dry(bench.dry(policy, best_share(bench, policy, workload)), workload, at_a_time)
        for name, policy in (POLICIES | {BEST_CUT: OURS_BEST_CUT}).items()
    }


def eviction_rates(bench: Bench, workload: Workload) -> dict[str, float]:
    """Hit rates of ours by eviction policy, without a model."""
    ours, at_a_time = POLICIES[OURS], bench.setup.max_requests
    return {
        eviction: play_dry(
            bench.dry(ours, None, CacheOptions(eviction=eviction)), workload, at_a_time
        )
        for eviction in EVICTION
    }
