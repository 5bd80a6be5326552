"""A hybrid whose workers have pages for few of their sequences: all are served, none is harmed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from e2e.asking import ask
from e2e.conftest import GRID, new_cluster
from stateferry.client import Client, GenerateOptions
from stateferry.local import LocalCluster
from support.local_engine import local_engine
from support.pools import wait_until_idle
from support.random_requests import random_requests
from support.tiny_hybrid import write_tiny_hybrid

CONTEXT = 8 * GRID
# A page is 16 kB and a sequence 92 kB: 24 sequences and pages for about three full ones.
MEMORY_BYTES = 3_400_000


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_hybrid(tmp_path_factory.mktemp("model") / "tiny", "FalconH1")


@pytest.fixture(scope="module")
def small(hybrid: Path) -> Iterator[LocalCluster]:
    with new_cluster(
        hybrid, model__max_context_tokens=CONTEXT, worker__memory_bytes=MEMORY_BYTES
    ) as running:
        yield running
        assert running.deaths == ()


async def test_requests_wait_for_pages_and_all_are_right(small: LocalCluster, hybrid: Path) -> None:
    requests = random_requests(60, seed=8, lengths=(5 * GRID,), max_prompt=5 * GRID)
    engine, _ = local_engine(hybrid)
    expected = await asyncio.to_thread(engine.generate, requests)
    async with Client(small.router_address) as client:
        for worker in await client.list_workers():
            pools = worker.description.pools
            assert worker.description.capacity_requests == pools.sequences == 24
            assert 8 <= pools.kv_pages < 60 and pools.kv_page_tokens == GRID
            assert (
                pools.state_slots * pools.state_slot_bytes
                + pools.tail_pages * pools.tail_page_bytes
                + pools.kv_pages * pools.kv_page_bytes
                <= MEMORY_BYTES
            )
        answers = await asyncio.gather(*(ask(client, request) for request in requests))
        for request, (ids, logprobs, _) in zip(requests, answers, strict=True):
            output = expected[request.request_id]
            assert ids == output.token_ids
            assert logprobs == [token.logprob for token in output.tokens]
        await wait_until_idle(client, within_s=3)


async def test_pages_come_back_from_a_request_that_is_cut_off(small: LocalCluster) -> None:
    [request] = random_requests(1, seed=9, lengths=(3 * GRID,), max_tokens=(4 * GRID,))
    streaming, ended = 0, 0

    async def begin(client: Client, request_id: str) -> None:
        nonlocal streaming, ended
        options = GenerateOptions(max_tokens=4 * GRID, ignore_eos=True, request_id=request_id)
        streams = False
        try:
            async for _ in client.generate(request.prompt_ids, options):
                streams = True
            ended += 1
        except asyncio.CancelledError:
            streaming += streams
            raise

    async with Client(small.router_address) as client:
        for wait_s in (0.0, 0.005, 0.02, 0.05, 0.1, 0.3):
            running = [asyncio.ensure_future(begin(client, f"cut-{wait_s}-{n}")) for n in range(6)]
            await asyncio.sleep(wait_s)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        assert streaming and streaming + ended < 36, "cut off while waiting, and while streaming"
        await wait_until_idle(client, within_s=3)


async def test_what_never_fits_is_refused_by_the_name_of_its_field(small: LocalCluster) -> None:
    options = GenerateOptions(max_tokens=CONTEXT - GRID, timeout_s=20, request_id="too-long")
    async with Client(small.router_address) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in client.generate((5,) * (GRID + 1), options):
                pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith("stop.max_tokens: ")
