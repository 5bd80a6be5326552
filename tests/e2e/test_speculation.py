"""Decode workers with drafts, through a whole cluster: clients get what they get without."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from e2e.conftest import new_cluster
from e2e.test_services import scrape
from stateferry.client import Client
from stateferry.local import LocalCluster
from support.client_streams import Stream, mixed_streams, run_all
from support.pools import wait_until_idle

TOKENS = 90


def repetitive(count: int) -> list[Stream]:
    """What a random model says soon repeats itself; so do these prompts."""
    streams = mixed_streams(count, 11, tokens=TOKENS, lengths=(7, 12))
    return [Stream(stream.prompt * 6, stream.options) for stream in streams]


async def answers(cluster: LocalCluster, streams: list[Stream]) -> list[object]:
    async with Client(cluster.router_address) as client:
        await run_all(client, streams)
    return [stream.answer for stream in streams]


async def test_drafts_through_a_cluster_and_a_killed_worker(tiny_model: Path) -> None:
    streams = repetitive(8)
    with new_cluster(tiny_model) as plain:
        expected = await answers(plain, [stream.again() for stream in streams])
    drafts = {"speculation__drafter": "ngram", "speculation__draft_tokens": 5}
    with new_cluster(tiny_model, decode=2, **drafts) as cluster:
        assert await answers(cluster, [stream.again() for stream in streams]) == expected
        accepted = sum(
            scrape(cluster, name)["stateferry_worker_draft_tokens_total", ("accepted",)]
            for name in ("decode-0", "decode-1")
        )
        assert accepted > 0, "nothing was drafted, or all of it was wrong"
        async with Client(cluster.router_address) as client:
            tasks = [asyncio.create_task(stream.run(client)) for stream in streams]
            await asyncio.gather(*(stream.has(6) for stream in streams))
            cluster.kill("decode-1", signal.SIGKILL)
            async with asyncio.timeout(60):
                await asyncio.gather(*tasks)
            assert [stream.answer for stream in streams] == expected
            assert max(stream.attempts for stream in streams) > 1, "it had no streams"
            await wait_until_idle(client, 3.0)
