"""Names, units, labels and values of all metrics."""

from __future__ import annotations

import re
import urllib.request

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from stateferry.core.errors import ConfigError
from stateferry.core.worker import PoolCount, PoolSizes, WorkerLoad
from stateferry.router.observer import NoObserver, RouterObserver
from stateferry.telemetry.exporter import start_exporter
from stateferry.telemetry.metrics import (
    RouterMetrics,
    WorkerMetrics,
    new_registry,
    set_build_info,
)
from stateferry.worker.meter import WorkerMeter

LABELS = {
    "cause",
    "code",
    "role",
    "kind",
    "result",
    "status",
    "transport",
    "version",
    "kernels",
    "le",
}


def fill(registry: CollectorRegistry) -> None:
    """One of everything."""
    set_build_info(registry, role="decode", version="1", kernels="torch", transport="ucx")
    router = RouterMetrics(registry)
    router.request_started()
    router.request_finished("OK", 0.5)
    router.handoff("ucx", 4096, 0.002)
    worker = WorkerMetrics(registry)
    worker.observe_step("decode", 0.003, 4, 4)
    worker.handoff_sealed(4096, 0.002)
    worker.set_pools(PoolCount(3, 8), PoolCount(1, 2), PoolCount(0, 0))


@pytest.fixture
def ours() -> list[Metric]:
    registry = CollectorRegistry()
    fill(registry)
    return list(registry.collect())


def test_names_carry_component_and_base_unit(ours: list[Metric]) -> None:
    assert len(ours) > 15
    for metric in ours:
        assert re.fullmatch(r"stateferry_(router|worker|process)_[a-z_]+", metric.name)
        assert not re.search(r"(_ms|_us|_kb|_mb|millis|percent)", metric.name), metric.name
        assert metric.documentation.endswith("."), metric.name
        if metric.type == "histogram":
            assert re.search(r"_(seconds|bytes|sequences|tokens)$", metric.name), metric.name
        if metric.type == "counter":
            assert all(s.name.endswith(("_total", "_created")) for s in metric.samples)


def test_labels_are_of_the_bounded_set(ours: list[Metric]) -> None:
    used = {label for metric in ours for sample in metric.samples for label in sample.labels}
    assert used <= LABELS
    assert {"code", "kind", "status"} <= used


def test_router_metrics_are_what_the_router_reports_to() -> None:
    """Every method of the protocol, with the same parameters, changes some sample."""
    calls = {
        "request_started": (),
        "request_finished": ("UNAVAILABLE", 0.1),
        "tokens": (11, 7),
        "queued": (0.01,),
        "first_token": (0.02,),
        "inter_token": (0.003,),
        "handoff": ("ucx", 123, 0.004),
        "failed_over": ("WorkerLost",),
        "resumed": (0.7,),
        "occupancy": (5, 2),
        "workers": ("decode", 3),
    }
    assert set(calls) == {name for name in vars(NoObserver) if not name.startswith("_")}
    for name, arguments in calls.items():
        registry = CollectorRegistry()
        router: RouterObserver = RouterMetrics(registry)
        before = values(registry)
        getattr(router, name)(*arguments)
        assert values(registry) != before, name


def values(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    return {
        (s.name, str(s.labels)): s.value for metric in registry.collect() for s in metric.samples
    }


def test_router_values() -> None:
    registry = CollectorRegistry()
    router = RouterMetrics(registry)
    router.request_finished("OK", 0.5)
    router.tokens(prompt=11, generated=7)
    router.handoff("ucx", 100, 0.5)
    router.handoff("ucx", 23, 0.5)
    router.occupancy(in_flight=5, waiting=2)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"stateferry_router_{name}", labels)

    assert value("requests_total", code="OK") == 1
    assert value("prompt_tokens_total") == 11
    assert value("generated_tokens_total") == 7
    assert value("handoff_bytes_total", transport="ucx") == 123
    assert value("handoff_seconds_sum") == 1.0
    assert value("requests_in_flight") == 5
    assert value("requests_queued") == 2
    # An alarm on "no decode worker" needs the series before the first worker came.
    assert value("workers", role="decode") == 0


def test_worker_values() -> None:
    registry = CollectorRegistry()
    worker = WorkerMetrics(registry)
    meter: WorkerMeter = worker
    meter.observe_step("extend", 0.25, 2, 130)
    meter.handoff_sealed(70_000, 0.5)
    meter.handoff_failed()
    meter.preempted(2, 30)
    meter.preempted(1, 0)
    worker.set_load(
        WorkerLoad(
            sequence=1,
            active_requests=4,
            queued_requests=3,
            queued_tokens=999,
            state_slots=PoolCount(free=2, total=10),
            tail_pages=PoolCount(free=5, total=6),
            kv_pages=PoolCount(free=30, total=100),
        )
    )
    worker.set_pool_sizes(
        PoolSizes(
            sequences=5,
            state_slots=11,
            tail_pages=6,
            kv_pages=100,
            kv_page_tokens=64,
            state_slot_bytes=1000,
            tail_page_bytes=10,
            kv_page_bytes=500,
        )
    )

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"stateferry_worker_{name}", labels)

    assert value("step_seconds_sum", kind="extend") == 0.25
    assert value("step_sequences_sum", kind="extend") == 2
    assert value("step_tokens_sum", kind="extend") == 130
    assert value("handoff_bytes_sum") == 70_000
    assert value("handoff_seconds_sum") == 0.5
    assert value("handoffs_total", result="sealed") == 1
    assert value("handoffs_total", result="failed") == 1
    assert value("preemptions_total") == 3 and value("recomputed_tokens_total") == 30
    assert value("requests_active") == 4
    assert value("requests_queued") == 3
    assert value("tokens_queued") == 999
    assert value("state_slots", status="free") == 2
    assert value("state_slots", status="used") == 8
    assert value("tail_pages", status="used") == 1
    assert value("kv_pages", status="free") == 30
    assert value("kv_pages", status="used") == 70
    assert value("pool_bytes", pool="state_slots") == 11_000
    assert value("pool_bytes", pool="tail_pages") == 60
    assert value("pool_bytes", pool="kv_pages") == 50_000


def test_two_registries_do_not_share() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    WorkerMetrics(first).set_requests(3, 0)
    WorkerMetrics(second)
    assert first.get_sample_value("stateferry_worker_requests_active") == 3
    assert second.get_sample_value("stateferry_worker_requests_active") == 0


def test_the_page_is_served_and_closed() -> None:
    registry = new_registry()
    fill(registry)
    exporter = start_exporter(registry, "127.0.0.1", 0)
    url = f"http://{exporter.address}/metrics"
    with urllib.request.urlopen(url, timeout=5) as response:
        page = response.read().decode()
    assert 'stateferry_process_info{kernels="torch",role="decode"' in page
    assert "process_resident_memory_bytes" in page
    exporter.close()
    with pytest.raises(OSError):
        urllib.request.urlopen(url, timeout=1)


def test_a_taken_port_is_a_setting_to_change() -> None:
    exporter = start_exporter(CollectorRegistry(), "127.0.0.1", 0)
    try:
        port = int(exporter.address.rpartition(":")[2])
        with pytest.raises(ConfigError, match="metrics_port"):
            start_exporter(CollectorRegistry(), "127.0.0.1", port)
    finally:
        exporter.close()
