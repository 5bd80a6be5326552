"""Every counter of the cache is on the page, under one name, and so is every owner."""

from __future__ import annotations

import dataclasses

from prometheus_client import CollectorRegistry, generate_latest

from stateferry.cache.cache_counters import CacheCounters
from stateferry.cache.slots import Occupancy
from stateferry.telemetry.cache_metrics import CacheCollector


def test_all_of_it_is_exported() -> None:
    fields = [field.name for field in dataclasses.fields(CacheCounters)]
    counters = CacheCounters(**{name: 1000 + n for n, name in enumerate(fields)})
    owners = Occupancy(free=1, running=2, cached=3, in_transfer=4, quarantined=5)
    registry = CollectorRegistry()
    registry.register(
        CacheCollector(
            counters=lambda: dataclasses.asdict(counters),
            occupancy=lambda: {"KV page": dataclasses.asdict(owners)},
        )
    )
    page = generate_latest(registry).decode()
    samples = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    exported = sorted(
        float(value) for name, value in samples.items() if name.startswith("stateferry_cache")
    )
    assert exported == [1000.0 + n for n in range(len(fields))]
    assert samples['stateferry_worker_pool_ids{owner="cached",pool="kv_pages"}'] == "3.0"
    assert samples['stateferry_cache_tokens_total{kind="tail_hit"}'] == str(
        float(counters.tail_hit_tokens)
    )
