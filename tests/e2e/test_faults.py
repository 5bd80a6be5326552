"""Somebody dies or goes away in the middle: the others notice, say so, and free what they held."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time

import grpc
import pytest

from stateferry.client import Client, Delta, GenerateOptions
from stateferry.local import LocalCluster
from stateferry.v1 import inference_pb2, inference_pb2_grpc
from support.pools import wait_until_idle

PROMPT = tuple(range(3, 103))
LONG = GenerateOptions(max_tokens=20_000, temperature=0.0, ignore_eos=True)
# A second to free everything, and two heartbeats until the router can tell.
FREED_S = 2.0
VERY_LONG_PROMPT = tuple(3 + i % 200 for i in range(12_000))


async def stream_until_error(
    client: Client, started: asyncio.Event, prompt: tuple[int, ...] = PROMPT
) -> tuple[grpc.StatusCode, int]:
    """The status a stream ends with, and how many tokens came before it."""
    tokens = 0
    try:
        async for event in client.generate(prompt, LONG):
            if isinstance(event, Delta):
                tokens += len(event.token_ids)
                if tokens >= 8:
                    started.set()
    except grpc.aio.AioRpcError as error:
        return error.code(), tokens
    raise AssertionError("the stream ended well")


async def test_decode_killed_in_mid_stream(own_cluster: LocalCluster) -> None:
    async with Client(own_cluster.router_address) as client:
        started = [asyncio.Event() for _ in range(4)]
        streams = [asyncio.create_task(stream_until_error(client, s)) for s in started]
        await asyncio.gather(*(asyncio.wait_for(s.wait(), 20) for s in started))
        own_cluster.kill("decode-0", signal.SIGKILL)
        began_s = time.monotonic()
        results = await asyncio.wait_for(asyncio.gather(*streams), 5)
        assert time.monotonic() - began_s < 2.0
        assert {code for code, _ in results} == {grpc.StatusCode.UNAVAILABLE}
        assert own_cluster.wait_dead("decode-0", 5)
        [death] = own_cluster.deaths
        assert death.name == "decode-0" and "SIGKILL" in str(death)
        # The router lives, knows, and says so.
        assert await client.list_models()
        workers = await client.list_workers()
        assert [w.description.worker_id for w in workers] == ["prefill-0"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in client.generate(PROMPT, LONG):
                pass
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await wait_until_idle(client, FREED_S) <= FREED_S


async def test_prefill_killed_before_the_hand_off(own_cluster: LocalCluster) -> None:
    async with Client(own_cluster.router_address) as client:
        never = asyncio.Event()
        stream = asyncio.create_task(stream_until_error(client, never, VERY_LONG_PROMPT))
        await _until_dispatched(client, "prefill-0")
        own_cluster.kill("prefill-0", signal.SIGKILL)
        began_s = time.monotonic()
        code, tokens = await asyncio.wait_for(stream, 5)
        assert time.monotonic() - began_s < 2.0
        assert (code, tokens) == (grpc.StatusCode.UNAVAILABLE, 0)
        # What decode had reserved comes back.
        assert await wait_until_idle(client, FREED_S) <= FREED_S
        workers = await client.list_workers()
        assert [w.description.worker_id for w in workers] == ["decode-0"]


async def test_prefill_killed_after_the_hand_off_hurts_nobody(own_cluster: LocalCluster) -> None:
    async with Client(own_cluster.router_address) as client:
        options = GenerateOptions(max_tokens=300, temperature=0.0, ignore_eos=True)
        tokens = 0
        async for event in client.generate(PROMPT, options):
            if isinstance(event, Delta):
                tokens += len(event.token_ids)
                if tokens == 20:
                    own_cluster.kill("prefill-0", signal.SIGKILL)
        assert tokens == 300
        assert own_cluster.wait_dead("prefill-0", 5)


@pytest.mark.parametrize("after_tokens", [1, 30])
async def test_cancel_frees_both_sides(cluster: LocalCluster, after_tokens: int) -> None:
    async with Client(cluster.router_address) as client:
        for _ in range(5):
            tokens = 0
            async for event in client.generate(PROMPT, LONG):
                if isinstance(event, Delta):
                    tokens += len(event.token_ids)
                if tokens >= after_tokens:
                    break
        assert await wait_until_idle(client, FREED_S) <= FREED_S


async def test_cancel_during_prefill_frees_both_sides(cluster: LocalCluster) -> None:
    async with Client(cluster.router_address) as client:
        stream = asyncio.create_task(stream_until_error(client, asyncio.Event(), VERY_LONG_PROMPT))
        await _until_dispatched(client, "prefill-0")
        stream.cancel()
        assert await wait_until_idle(client, FREED_S) <= FREED_S


async def test_a_storm_of_cancels_leaks_nothing(cluster: LocalCluster) -> None:
    async with Client(cluster.router_address) as client:

        async def give_up(number: int) -> None:
            prompt = PROMPT[: 1 + number % 100]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.002 * (number % 50)):
                    async for _ in client.generate(prompt, LONG):
                        pass

        for batch in range(8):
            await asyncio.gather(*(give_up(25 * batch + n) for n in range(25)))
        await wait_until_idle(client, within_s=3)
        ended = [e async for e in client.generate(PROMPT, GenerateOptions(max_tokens=3))]
        assert ended, "the cluster does not serve any more"


async def test_a_deadline_ends_the_stream_and_frees_both_sides(cluster: LocalCluster) -> None:
    async with Client(cluster.router_address) as client:
        options = GenerateOptions(max_tokens=20_000, ignore_eos=True, timeout_s=0.5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in client.generate(PROMPT, options):
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await wait_until_idle(client, FREED_S) <= FREED_S


async def _until_dispatched(client: Client, worker_id: str) -> None:
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        for worker in await client.list_workers():
            if worker.description.worker_id == worker_id and worker.dispatched_requests:
                return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{worker_id} never got a request")


async def test_clients_that_do_not_read_hold_no_decode_worker(cluster: LocalCluster) -> None:
    """As many streams as decode has places, none of which is read; then a client that reads."""
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    async with (
        Client(cluster.router_address) as client,
        grpc.aio.insecure_channel(cluster.router_address, options=narrow) as channel,
    ):
        request = inference_pb2.GenerateRequest(logprobs=20)
        request.token_ids.ids.extend(PROMPT)
        request.stop.max_tokens = 300
        request.stop.ignore_eos = True
        stub = inference_pb2_grpc.InferenceStub(channel)
        stalled = [stub.Generate(request) for _ in range(24)]
        options = GenerateOptions(max_tokens=5, ignore_eos=True, timeout_s=15)
        tokens = 0
        async for event in client.generate(PROMPT, options):
            if isinstance(event, Delta):
                tokens += len(event.token_ids)
        assert tokens == 5
        # Decode has finished all of them by itself, though their clients have read nothing.
        await wait_until_idle(client, within_s=15)
        for call in stalled:
            call.cancel()
