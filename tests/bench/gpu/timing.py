"""Times of GPU work: whole calls captured into graphs, contenders taking turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]


def times_us(contenders: Mapping[str, Sequence[Call]], rounds: int = 7) -> dict[str, float]:
    """Median time of one call by contender, in us. A contender's calls run one after the other,
    each on its own memory where that must not stay in the cache.

    Captured, because launches from Python would be what is measured of the smaller ones; a call
    that cannot be captured raises, and is not timed in another way.
    """
    graphs = {name: _captured(calls) for name, calls in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds[name].append(begin.elapsed_time(end) * 1e3 / len(contenders[name]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def repeated(call: Call, times: int) -> list[Call]:
    return [call] * times


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    for _ in range(2):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph
