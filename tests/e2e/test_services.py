"""Every process speaks the standard protocols: health, reflection, a Prometheus page."""

from __future__ import annotations

import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from stateferry.client import Client, GenerateOptions
from stateferry.local import LocalCluster
from stateferry_kernels.dispatch import select_kernels

SERVICES = {
    "router": {"stateferry.v1.Inference", "stateferry.v1.Membership"},
    "prefill-0": {"stateferry.v1.Prefill"},
    "decode-0": {"stateferry.v1.Decode"},
}


@pytest.mark.parametrize("name", SERVICES)
async def test_health_and_reflection(cluster: LocalCluster, name: str) -> None:
    async with grpc.aio.insecure_channel(cluster.addresses[name]["grpc"]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", *SERVICES[name]):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection.ServerReflectionInfo(iter([request]))
        reply = await call.read()
        call.cancel()
        listed = {service.name for service in reply.list_services_response.service}
        assert SERVICES[name] | {"grpc.health.v1.Health"} <= listed


async def test_metrics_tell_what_happened(cluster: LocalCluster) -> None:
    async with Client(cluster.router_address) as client:
        options = GenerateOptions(max_tokens=5, ignore_eos=True)
        events = [event async for event in client.generate(list(range(3, 80)), options)]
        assert events
        workers = await client.list_workers()
    assert {w.description.kernels for w in workers} == {select_kernels().name}
    router = scrape(cluster, "router")
    assert router["stateferry_router_requests_total", ("OK",)] >= 1
    assert router["stateferry_router_time_to_first_token_seconds_count", ()] >= 1
    assert router["stateferry_router_inter_token_seconds_count", ()] >= 4
    assert router["stateferry_router_handoff_bytes_total", ("ucx",)] > 0
    assert router["stateferry_router_workers", ("decode",)] == 1
    prefill = scrape(cluster, "prefill-0")
    assert prefill["stateferry_worker_step_seconds_count", ("extend",)] >= 1
    assert prefill["stateferry_worker_handoffs_total", ("sealed",)] >= 1
    decode = scrape(cluster, "decode-0")
    assert decode["stateferry_worker_step_seconds_count", ("decode",)] >= 4
    assert decode["stateferry_worker_handoff_bytes_sum", ()] > 0
    assert decode["stateferry_worker_state_slots", ("free",)] > 0


def scrape(cluster: LocalCluster, name: str) -> dict[tuple[str, tuple[str, ...]], float]:
    url = f"http://{cluster.addresses[name]['metrics']}/metrics"
    with urllib.request.urlopen(url, timeout=5) as page:
        families = text_string_to_metric_families(page.read().decode())
        return {
            (sample.name, tuple(sample.labels.values())): sample.value
            for family in families
            for sample in family.samples
        }
