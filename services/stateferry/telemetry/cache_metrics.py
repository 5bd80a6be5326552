"""What a worker's cache did, read when somebody scrapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_EVENTS = ("inserted", "duplicate", "evicted", "dropped", "moved_out", "restored")

# Family -> help, labels, and for each counter of the cache its labels' values.
_FAMILIES: dict[str, tuple[str, tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "stateferry_cache_lookups": ("Prompts that were looked up.", (), {"lookups": ()}),
    "stateferry_cache_repeated_prompts": (
        "Prompts that were known to their end and ran no forward.",
        (),
        {"repeated_prompts": ()},
    ),
    "stateferry_cache_tokens": (
        "Prompt tokens: of all looked up (prompt), resumed from a state (boundary_hit) and from a "
        "tail after it (tail_hit), and computed again although their keys and values were here.",
        ("kind",),
        {
            "prompt_tokens": ("prompt",),
            "boundary_hit_tokens": ("boundary_hit",),
            "tail_hit_tokens": ("tail_hit",),
            "kv_only_tokens": ("kv_only",),
        },
    ),
    "stateferry_cache_snapshots": (
        "Snapshots planned for prompts, and left out for want of memory.",
        ("event",),
        {"snapshots_planned": ("planned",), "snapshots_skipped": ("skipped",)},
    ),
    "stateferry_cache_entries": (
        "What entered the cache, was there already, left it for want of memory or for another "
        "reason, was moved to host memory or came back from there.",
        ("kind", "event"),
        {
            f"{kind}s_{event}": (kind, event)
            for kind in ("state", "tail", "kv_page")
            for event in _EVENTS
            if (kind, event) != ("kv_page", "dropped")
        },
    ),
    "stateferry_cache_host_bytes": (
        "Bytes moved to host memory, dropped there and brought back from there. It holds what was "
        "moved out and not dropped.",
        ("event",),
        {
            "host_moved_out_bytes": ("moved_out",),
            "host_dropped_bytes": ("dropped",),
            "host_restored_bytes": ("restored",),
        },
    ),
    "stateferry_cache_protections": (
        "Snapshots that are to be evicted last, of sessions and of preempted sequences: protected, "
        "needed no longer, too old, more than the budget; and evicted all the same.",
        ("event",),
        {
            "protections_begun": ("begun",),
            "protections_ended": ("ended",),
            "protections_expired": ("expired",),
            "protections_over_budget": ("over_budget",),
            "protected_evicted": ("evicted",),
        },
    ),
    "stateferry_cache_copies": (
        "Pages copied because a sequence goes on writing where a snapshot ends.",
        ("kind",),
        {"tail_copies": ("tail",), "kv_copies": ("kv_page",)},
    ),
}


class CacheCollector(Collector):
    """``counters`` gives the cache's counters by name, ``occupancy`` ids by pool and kind of
    owner. Both are called on the exporter's thread."""

    def __init__(
        self,
        counters: Callable[[], Mapping[str, int]],
        occupancy: Callable[[], Mapping[str, Mapping[str, int]]],
    ) -> None:
        self._counters = counters
        self._occupancy = occupancy

    def collect(self) -> Iterator[Metric]:
        """All families, as they are now."""
        values = self._counters()
        for name, (help, labels, counters) in _FAMILIES.items():
            family = CounterMetricFamily(name, help, labels=labels)
            for counter, label_values in counters.items():
                family.add_metric(label_values, values[counter])
            yield family
        gauge = GaugeMetricFamily(
            "stateferry_worker_pool_ids", "Places of a pool by owner.", labels=("pool", "owner")
        )
        for pool, owners in self._occupancy().items():
            for owner, count in owners.items():
                gauge.add_metric((pool.lower().replace(" ", "_") + "s", owner), count)
        yield gauge
