"""Times that can be compared: contenders take turns, and ratios are taken turn by turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

# ||a - b|| / ||b||; of a contender whose outputs are rounded to the dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# Below this one pass over the buffers may sit in a cache, and the one before evicted it.
_CACHED_PASS_S = 0.005
# Above this a part of the buffers is enough: it is more than a cache holds.
_LONG_PASS_S = 0.1


class Mismatch(Exception):
    """A contender computes something else: its time would say nothing."""


class Contender(Protocol):
    """``sample`` makes so many calls and returns seconds per call; after ``period`` calls it has
    been through all of its buffers."""

    period: int

    def sample(self, calls: int) -> float: ...


class Local:
    """Calls a function of this process with 0, 1, .. so that it can rotate through ``period``
    buffers."""

    def __init__(self, call: Callable[[int], object], period: int = 1) -> None:
        self.call = call
        self.period = period

    def sample(self, calls: int) -> float:
        start = time.perf_counter()
        for number in range(calls):
            self.call(number % self.period)
        return (time.perf_counter() - start) / calls


@dataclass(frozen=True)
class Times:
    """Seconds per call, by contender and round."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def best(self, name: str) -> float:
        return min(self.seconds[name])

    def speedup(self, name: str, over: str) -> float:
        """How many times as fast as ``over``: the median of the rounds' ratios."""
        pairs = zip(self.seconds[name], self.seconds[over], strict=True)
        return statistics.median(theirs / ours for ours, theirs in pairs)

    def fastest(self, names: Sequence[str]) -> str:
        return min(names, key=self.median)


def interleave(
    contenders: Mapping[str, Contender], rounds: int, sample_s: float, group_s: float
) -> Times:
    """Every contender once per round, in alternating order, each sample at least ``sample_s`` long.
    Slow contenders get fewer rounds, three at least, to end after about ``group_s``."""
    calls, warm_ups, round_s = {}, {}, 0.0
    for name, contender in contenders.items():
        # The first call pays for what is made once.
        contender.sample(1)
        seconds = _wall_s(contender, 1)
        if seconds * contender.period > _LONG_PASS_S:
            calls[name] = min(contender.period, math.ceil(max(sample_s, _LONG_PASS_S) / seconds))
        else:
            seconds = _wall_s(contender, contender.period)
            passes = max(1, math.ceil(sample_s / (seconds * contender.period)))
            calls[name] = passes * contender.period
        fits_a_cache = seconds * contender.period < _CACHED_PASS_S
        warm_ups[name] = contender.period if fits_a_cache else 0
        round_s += seconds * (calls[name] + warm_ups[name])
    rounds = min(rounds, max(3, int(group_s / round_s))) if math.isfinite(group_s) else rounds
    seconds_by_name: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        names = list(contenders) if number % 2 == 0 else list(reversed(contenders))
        for name in names:
            if warm_ups[name]:
                contenders[name].sample(warm_ups[name])
            seconds_by_name[name].append(contenders[name].sample(calls[name]))
    return Times(seconds_by_name)


def _wall_s(contender: Contender, calls: int) -> float:
    """Seconds that a call takes, which need not be those it reports."""
    start = time.perf_counter()
    contender.sample(calls)
    return (time.perf_counter() - start) / calls


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||; infinite when either holds NaN."""
    a, b = a.double(), b.double()
    error = float((a - b).norm() / b.norm().clamp(min=1e-30))
    return error if math.isfinite(error) else math.inf


def expect_same(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Raises Mismatch unless both agree to the coarser dtype's tolerance."""
    tolerance = max(TOLERANCE[ours.dtype], TOLERANCE[theirs.dtype])
    error = relative_error(ours, theirs)
    if error > tolerance:
        raise Mismatch(f"{what}: relative error {error:.2g}, expected at most {tolerance:.0e}")
