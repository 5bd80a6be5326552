"""The measurements of ``make bench-transfer``, arms interleaved, medians over rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from bench.transfer.arms import ARMS, GRPC, OURS, UCX, Peer, Timing
from bench.transfer.shapes import PROMPTS, SHAPES, segments_in

MB = 1 << 20


@dataclass(frozen=True, slots=True)
class SizeResult:
    """Of one size: GB/s by arm, and the median over rounds of our rate over the others'."""

    size_mb: int
    gbps: dict[str, float]
    vs_ucx: float
    vs_grpc: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class ShapeResult:
    """One model's hand-off. ``moved_bytes`` is less than ``total_bytes`` where KV was cut."""

    model: str
    prompt_tokens: int
    total_bytes: int
    moved_bytes: int
    seconds: float
    cpu_s: float

    @property
    def note(self) -> str:
        if self.moved_bytes == self.total_bytes:
            return ""
        return f"KV cut: {self.moved_bytes / MB:.0f} of {self.total_bytes / MB:.0f} MB were moved"


async def measure_sizes(
    peer: Peer, sizes_mb: tuple[int, ...], rounds: int, show: Callable[[SizeResult], None]
) -> list[SizeResult]:
    """Every size by every arm, one after the other in each round; the first round warms up."""
    results = []
    for size_mb in sizes_mb:
        size_bytes = size_mb * MB
        timings: dict[str, list[Timing]] = {arm: [] for arm in ARMS}
        for number in range(rounds + 1):
            # Each round begins with another arm: no arm always follows the same one.
            for arm in (*ARMS[number % len(ARMS) :], *ARMS[: number % len(ARMS)]):
                timing = await peer.send(arm, size_bytes)
                if number:
                    timings[arm].append(timing)
        seconds = {arm: [t.seconds for t in timings[arm]] for arm in ARMS}
        ratios = {
            other: statistics.median(
                theirs / ours for ours, theirs in zip(seconds[OURS], seconds[other], strict=True)
            )
            for other in (UCX, GRPC)
        }
        result = SizeResult(
            size_mb,
            {arm: size_bytes / statistics.median(seconds[arm]) / 1e9 for arm in ARMS},
            ratios[UCX],
            ratios[GRPC],
            statistics.median(t.cpu_s for t in timings[OURS]),
        )
        show(result)
        results.append(result)
    return results


async def measure_shapes(
    peer: Peer, rounds: int, max_bytes: int, show: Callable[[ShapeResult], None]
) -> list[ShapeResult]:
    """Hand-offs as they would be of public models, prompt by prompt."""
    results = []
    for shape in SHAPES:
        for tokens in PROMPTS:
            sizes = shape.segment_sizes(tokens, max_bytes)
            segments = segments_in(peer.memory, sizes)
            timings = [await peer.hand_off(segments) for _ in range(rounds + 1)][1:]
            result = ShapeResult(
                shape.name,
                tokens,
                shape.total_bytes(tokens),
                sum(size_bytes for _, _, size_bytes in sizes),
                statistics.median(t.seconds for t in timings),
                statistics.median(t.cpu_s for t in timings),
            )
            show(result)
            results.append(result)
    return results
